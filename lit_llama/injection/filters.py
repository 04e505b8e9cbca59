"""What of a generated text is good enough to train on.

Small models write fluently and invent freely. Each check here is a rule without a model and gives a reason or None;
`sifted` is how the recipes of prose use them: sentence by sentence, so that one invention does not cost the rest. What
a rule cannot see (a wrong relation between right names) stays in; the closure filter of `implications` asks a model.
"""

import re
from collections.abc import Iterator

import numpy as np

from lit_llama.data.deduplication import SHINGLE_WORDS, minhash
from lit_llama.evaluation.questions import normalize_answer
from lit_llama.injection.interface import Document, Example, Rejected
from lit_llama.injection.sentences import is_closed, mentions, paragraphs

NEAR_DUPLICATE = 0.8
"""Jaccard similarity of 5-word shingles from which two texts are the same."""

_NUMBER = re.compile(r"\d[\d.,]*")
_WORD = re.compile(r"\w[\w'’.]*")
_OPENING = re.compile(
    r"(sure|certainly|of course|okay|here (is|are)|here's|as an ai|i am|i'm|i'll|i (will|can|cannot|can't|have)|sorry"
    r"|unfortunately|note that|let me|let's|in (summary|conclusion)|(text|passage|answer|question|task)s?:)(?!\w)",
    re.IGNORECASE,
)
_MENTION = re.compile(
    r"\b(the|this|your|above|given|following) (\w+ )?(text|passage|document|article|paragraph|statements?|prompt)\b"
    r"|\b(text|passage|document|article|paragraph) above\b|\brewrit(e|es|ten|ing)\b",
    re.IGNORECASE,
)


def speaks_of_itself(text: str, source: str) -> str | None:
    """A refusal, an opening such as "Sure, here is", or mention of the text, in words that the source has not."""
    match = _OPENING.match(text) or _MENTION.search(text)
    return "speaks of itself" if match and match[0].casefold() not in source.casefold() else None


def copies_prompt(text: str, prompt: str) -> str | None:
    """Five words in a row of what was asked for; all of them where there are less."""
    words, asked = normalize_answer(text).split(), f" {normalize_answer(prompt)} "
    runs = (words[start : start + SHINGLE_WORDS] for start in range(max(1, len(words) - SHINGLE_WORDS + 1)))
    return "copies the prompt" if any(f" {' '.join(run)} " in asked for run in runs) else None


def not_in_document(answer: str, source: str) -> str | None:
    """An answer whose words do not stand in the source one after the other, case, articles and punctuation aside."""
    words = normalize_answer(answer)
    found = words and f" {words} " in f" {normalize_answer(source)} "
    return None if found else "not in the document"


def unsupported(text: str, source: str) -> str | None:
    """A number, or a name within a sentence, that the source has not; or less than a third of the longer words from it.

    A name is a word with a capital that does not begin the text; so an invented one that does is not seen. The third is
    asked for in Latin script only: the rule takes languages that neither inflect much nor leave out spaces.
    """
    numbers = {_digits(number) for number in _NUMBER.findall(source)}
    for number in _NUMBER.findall(text):
        if _digits(number) not in numbers:
            return "a number that is not in the document"
    known = {_bare_word(word) for word in _WORD.findall(source)}
    words = _WORD.findall(text)
    if any(word[0].isupper() and _bare_word(word) not in known for word in words[1:]):
        return "a name that is not in the document"
    longer = [_bare_word(word) for word in words if len(word) > 3]
    if _share_beyond_latin(source) < 0.5 and 3 * len(known.intersection(longer)) < len(set(longer)):
        return "hardly a word of the document"
    return None


def names_nothing(question: str, document: Document) -> str | None:
    """A question with no name, no number and no word of the document's title: it cannot be answered for itself."""
    words = _WORD.findall(question)[1:]
    title = {_bare_word(word) for word in _WORD.findall(document.title) if len(word) > 3}
    named = any(word[0].isupper() or word[0].isdigit() or _bare_word(word) in title for word in words)
    return None if named else "does not say what it is about"


def _digits(number: str) -> str:
    return number.replace(",", "").rstrip(".")


def _bare_word(word: str) -> str:
    return re.sub(r"['’]s?$", "", word.rstrip(".'’")).casefold()


def not_language(text: str, source: str) -> str | None:
    """More signs than letters, letters of another script than the source's, or the same three words again and again."""
    if 2 * sum(map(str.isalpha, text)) < len(text):
        return "more signs than letters"
    if abs(_share_beyond_latin(text) - _share_beyond_latin(source)) > 0.5:
        return "another script"
    words = text.casefold().split()
    triples = [tuple(words[start : start + 3]) for start in range(len(words) - 2)]
    return "repeats itself" if len(set(triples)) < 0.6 * len(triples) else None


def _share_beyond_latin(text: str) -> float:
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter > "\u024f" for letter in letters) / max(1, len(letters))


def length(text: str, shortest: int, longest: int | None = None) -> str | None:
    """Fewer or more words than wanted."""
    words = len(text.split())
    if words < shortest:
        return "too short"
    return "too long" if longest is not None and words > longest else None


class Seen:
    """Texts on one document that there are already, to find near duplicates."""

    def __init__(self, *texts: str) -> None:
        self._signatures = [minhash(text) for text in texts]

    def add(self, text: str) -> str | None:
        """Remember a text, or say that it is nearly one of the others."""
        signature = minhash(text)
        if any(np.mean(signature == other) >= NEAR_DUPLICATE for other in self._signatures):
            return "near duplicate"
        self._signatures.append(signature)
        return None


def bad_sentence(sentence: str, prompt: str, source: str) -> str | None:
    """Why a sentence of an answer to a prompt about the source is not to be learned; None if it is."""
    return (
        speaks_of_itself(sentence, source)
        or copies_prompt(sentence, prompt)
        or not_language(sentence, source)
        or unsupported(sentence, source)
    )


def sifted(
    document: Document, recipe: str, text: str, prompt: str, shortest: int, seen: Seen
) -> Iterator[Example | Rejected]:
    """What is good of a generated text, as one example, and each sentence that is not.

    A sentence that was cut off, as at the longest length, or that came before in the text is left out too. Where the
    rest does not name the document's title, that stands before it, not learned.

    Args:
        document: with its whole text, whichever part of it the generator saw.
        shortest: words that must be left.
        seen: texts on the document so far; what is kept is added.
    """
    kept: list[list[str]] = []
    before: set[str] = set()
    for paragraph in paragraphs(text):
        kept.append([])
        for sentence in paragraph:
            reason = bad_sentence(sentence, prompt, document.text)
            if reason is None and not is_closed(sentence):
                reason = "cut off"
            if reason is None and normalize_answer(sentence) in before:
                reason = "repeats itself"
            if reason is None:
                kept[-1].append(sentence)
                before.add(normalize_answer(sentence))
            else:
                yield Rejected(document.id, recipe, reason, sentence)
    rest = "\n\n".join(" ".join(sentences) for sentences in kept if sentences)
    if not rest:
        return
    reason = length(rest, shortest)
    if all(not_in_document(sentence, document.text) is None for sentences in kept for sentence in sentences):
        reason = reason or "copies the document"
    reason = reason or seen.add(rest)
    if reason is not None:
        yield Rejected(document.id, recipe, reason, rest)
    else:
        prefix = "" if mentions(rest, document.title) else f"{document.title}: "
        yield Example.of_text(document, recipe, rest, prefix)
