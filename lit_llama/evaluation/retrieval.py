"""Finding the passages that answer a question, by BM25, and putting them into its prompt: the open-book controls.

    documents -> passages of whole sentences, each with its document's title -> BM25 -> the best few above the question

No embedding model: over documents of a sub-domain, words are what tells passages apart, and the control stays exactly
reproducible.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lit_llama.evaluation.questions import score_answer
from lit_llama.injection.interface import Document


class Passage(NamedTuple):
    """A piece of a document, as a prompt shows it."""

    doc_id: str
    text: str


def cut_passages(document: Document, max_words: int = 100) -> list[Passage]:
    """A document as passages of whole sentences, of at most so many words each; longer sentences are cut.

    Args:
        max_words: without the title, which each passage begins with unless its own text does.
    """
    passages: list[list[str]] = [[]]
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", document.text):
        words = sentence.split()
        for start in range(0, len(words), max_words):
            piece = words[start : start + max_words]
            if len(passages[-1]) + len(piece) > max_words:
                passages.append([])
            passages[-1] += piece
    texts = [" ".join(words) for words in passages if words]
    return [
        Passage(
            document.id, text if text.casefold().startswith(document.title.casefold()) else f"{document.title}: {text}"
        )
        for text in texts
    ]


class PassageIndex:
    """BM25 over passages (Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework", equation 3.15).

    As Lucene has it (Kamphuis et al. 2020, "Which BM25 Do You Mean?", table 1), with exact lengths: a query's score is
    the sum over its words of

        log(1 + (n - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * length / mean length))

    with `df` of the n passages holding the word and `tf` times in this one; never negative. A word is a run of letters
    and digits, whatever its case.
    """

    def __init__(self, passages: Sequence[Passage], k1: float = 1.2, b: float = 0.75) -> None:
        self.passages = passages
        counts = [Counter(_words(passage.text)) for passage in passages]
        lengths = np.array([count.total() for count in counts], dtype=np.float64)
        penalties = k1 * (1 - b + b * lengths / max(lengths.mean(), 1)) if len(passages) else lengths
        postings: dict[str, list[tuple[int, int]]] = {}
        for number, count in enumerate(counts):
            for word, times in count.items():
                postings.setdefault(word, []).append((number, times))
        self._weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        """Of each word, the passages that hold it, and what it adds to the score of each."""
        for word, found in postings.items():
            numbers, times = np.array(found).T
            rarity = math.log(1 + (len(passages) - len(numbers) + 0.5) / (len(numbers) + 0.5))
            self._weights[word] = numbers, rarity * times / (times + penalties[numbers])

    def scores(self, query: str) -> np.ndarray:
        """Of every passage, fp64 (passages,); a word that the query has twice counts twice."""
        scores = np.zeros(len(self.passages))
        for word in _words(query):
            numbers, weights = self._weights.get(word, ((), 0.0))
            scores[list(numbers)] += weights
        return scores

    def best(self, query: str, count: int) -> list[Passage]:
        """The best so many passages that share a word with the query, best first."""
        scores = self.scores(query)
        order = np.argsort(-scores, kind="stable")[:count]
        return [self.passages[number] for number in order if scores[number] > 0]

    def best_of(self, doc_id: str | None, query: str, count: int) -> list[Passage]:
        """The best so many passages of one document, in their order: all of it, where there are no more than that."""
        own = [number for number, passage in enumerate(self.passages) if passage.doc_id == doc_id]
        scores = self.scores(query)
        return [self.passages[number] for number in sorted(sorted(own, key=lambda n: -scores[n])[:count])]


def open_book_prompt(question: str, passages: Sequence[Passage]) -> str:
    """The question as it is asked with passages to read; without any, as it stands."""
    if not passages:
        return question
    texts = "\n\n".join(passage.text for passage in passages)
    return f"Answer with the text below, in as few words as possible.\n\n{texts}\n\nQuestion: {question}"


def with_passages(
    questions: Sequence[dict[str, Any]],
    documents: Sequence[Document],
    context: Literal["oracle", "bm25"],
    top_k: int = 3,
    passage_words: int = 100,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions with something to read.

    Args:
        questions: rows of a question file; their "doc_id" is the document that "oracle" takes the passages from.
        context: oracle: the best passages of the question's own document; bm25: those of all documents.

    Returns:
        The questions as they are asked, and the rows with "passages" (the documents these are from) and "in_context"
        (1 where a right answer stands in them). A question without any is asked as it stands.
    """
    index = PassageIndex([passage for document in documents for passage in cut_passages(document, passage_words)])
    asked, rows = [], []
    for question in questions:
        text = question["question"]
        found = index.best(text, top_k) if context == "bm25" else index.best_of(question.get("doc_id"), text, top_k)
        asked.append({"id": question["id"], "question": open_book_prompt(text, found)} if found else question)
        holds = score_answer(" ".join(passage.text for passage in found), question["answers"])["contains"]
        rows.append({**question, "passages": [passage.doc_id for passage in found], "in_context": holds})
    return asked, rows


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())
