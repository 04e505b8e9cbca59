"""Examples of documents, kept on disk where a generator wrote them, and how many were fit for use.

    cache_dir/paraphrase-0f3a.../settings.json           the recipe's options, the generator and the seed
                                /norway-51c2....jsonl     what became of one document: examples and rejected texts

A folder belongs to one set of options, a file to one text: what is there was made in exactly this way.
"""

import hashlib
import inspect
import json
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lit_llama.command_line import StatusLine
from lit_llama.files import atomic_file, read_jsonl, write_json
from lit_llama.injection import filters
from lit_llama.injection.interface import (
    DOCUMENTS,
    Document,
    Example,
    Recipe,
    Rejected,
    Resources,
    example_of_row,
    example_rows,
)

_PLAN_OPTIONS = {"share"}
"""Options that change how much is trained on, and not what."""


@dataclass
class Yield:
    """What a recipe made of the documents.

    Attributes:
        documents: that it was given.
        examples: in all.
        made: those of them that are not a document as it stands.
        rejected: texts that were not good enough, by reason.
        without: ids of the documents of which nothing was made.
        cached: documents whose examples were there already.
        seconds: that the others took.
    """

    recipe: str
    documents: int
    examples: int
    made: int
    rejected: dict[str, int]
    without: list[str]
    cached: int
    seconds: float

    def summary(self) -> str:
        """One line for people."""
        text = f"{self.recipe}: {self.examples:,} examples of {self.documents:,} documents"
        if self.rejected:
            count = sum(self.rejected.values())
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.rejected.items())
            text += f"; {self.made:,} texts kept and {count:,} rejected ({reasons})"
        if self.without and self.made:
            some = ", ".join(self.without[:3]) + (", ..." if len(self.without) > 3 else "")
            text += f"; nothing from {len(self.without):,} documents ({some})"
        return text + (f"; {self.cached:,} documents from the cache" if self.cached else "")


def expand_cached(
    recipe: Recipe, documents: Sequence[Document], resources: Resources, seed: int, cache_dir: Path | None
) -> tuple[list[Example | Rejected], Yield]:
    """What a recipe makes of all documents.

    Where the recipe needs a generator, each document is written to the cache when it is done, and taken from there the
    next time: after a kill, the work goes on where it was.

    Args:
        seed: of the random draws; each document's are its own, whichever others there are.
        cache_dir: None: nothing is kept.

    Raises:
        InputError: a cache file that is damaged; names it.
    """
    generated = "generator" in recipe.needs
    folder = _folder(recipe, resources, seed, cache_dir) if generated and cache_dir is not None else None
    results: list[Example | Rejected] = []
    made, without, cached = 0, [], 0
    began, line = time.monotonic(), StatusLine()
    for number, document in enumerate(documents, start=1):
        path = None if folder is None else folder / _file_name(document)
        if path is not None and path.is_file():
            found = [example_of_row(row) for row in read_jsonl(path)]
            cached += 1
        else:
            draw = random.Random(f"{seed}-{recipe.name}-{document.id}")
            found = list(recipe.expand(document, resources, draw))
            if path is not None:
                with atomic_file(path) as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in example_rows(found))
        results += found
        of_document = sum(_is_made(result, document) for result in found)
        made += of_document
        if not of_document:
            without.append(document.id)
        if generated:
            rate = made / max(1e-9, time.monotonic() - began)
            line.show(
                f"{recipe.name}: {number:,} of {len(documents):,} documents, {made:,} examples, {rate:.2f} a second",
                last=number == len(documents),
            )
    line.clear()
    rejected = Counter(result.reason for result in results if isinstance(result, Rejected))
    examples = len(results) - rejected.total()
    seconds = time.monotonic() - began
    counts = dict(rejected.most_common())
    return results, Yield(recipe.name, len(documents), examples, made, counts, without, cached, seconds)


def _is_made(result: Example | Rejected, document: Document) -> bool:
    """Whether it is an example other than the document as it stands."""
    if isinstance(result, Rejected):
        return False
    return result.group != DOCUMENTS or result.segments[-1][0] != document.text


def _folder(recipe: Recipe, resources: Resources, seed: int, cache_dir: Path) -> Path:
    """The folder of these settings, made if it is not there."""
    settings = {
        "recipe": recipe.name,
        "options": {name: value for name, value in asdict(recipe).items() if name not in _PLAN_OPTIONS},
        "generator": resources.generator.identity,
        "seed": seed,
        # What was kept by other rules shall not pass for what these keep.
        "rules": hashlib.sha256((inspect.getsource(type(recipe)) + inspect.getsource(filters)).encode()).hexdigest(),
    }
    folder = cache_dir / f"{recipe.name}-{_digest(settings)}"
    if not (folder / "settings.json").is_file():
        write_json(folder / "settings.json", settings)
    return folder


def _file_name(document: Document) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', document.id)[:80]}-{_digest(asdict(document))}.jsonl"


def _digest(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
