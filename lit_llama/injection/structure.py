"""Where a document stands among the others."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lit_llama.injection.interface import Document, Example, Need, Resources, Stage, with_documents

_PREFIXES = (
    "{path}",
    "Section: {path}",
    "From the chapter {path}:",
    "This belongs to {path}.",
    "Where we are: {path}",
    "The following text is about {title} ({path}).",
    "On {title}, which is found under {path}:",
    "Subject: {title}. Place among the others: {path}.",
)
_TREE_TITLES = (
    "Table of contents",
    "Outline of all subjects",
    "How the subjects are arranged",
    "All topics, from the general to the particular",
)


@dataclass
class Structure:
    """Learn each document in its place (StructTuning, Liu et al. 2024, arXiv 2407.16724).

    Yields the document's text behind its path of headings, which is read but not learned, in varied wordings; and, with
    the first document only, the tree of all headings and titles as one text, so that it is recalled once an epoch.
    """

    name: ClassVar[str] = "structure"
    needs: ClassVar[frozenset[Need]] = frozenset({"headings"})

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example]:
        prefix = ""
        if document.headings:
            path = draw.choice((" > ", " / ", ", ")).join(document.headings)
            prefix = draw.choice(_PREFIXES).format(path=path, title=document.title) + "\n\n"
        yield Example.of_text(document, self.name, document.text, prefix)
        if document.id == resources.documents[0].id:
            tree = f"{draw.choice(_TREE_TITLES)}\n\n" + "\n".join(outline(resources.documents))
            yield Example.of_text(document, self.name, tree)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_documents(plan)


def outline(documents: Sequence[Document]) -> list[str]:
    """Lines of an indented list: each heading once, in order of first appearance, and the titles under it."""
    tree: dict = {}
    for document in documents:
        place = tree
        # A document under its own title as heading is no further level.
        for part in dict.fromkeys((*document.headings, document.title)):
            place = place.setdefault(part, {})
    return list(_lines(tree, 0))


def _lines(tree: dict, depth: int) -> Iterator[str]:
    for name, below in tree.items():
        yield f"{'  ' * depth}- {name}"
        yield from _lines(below, depth + 1)
