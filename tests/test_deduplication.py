"""MinHash against exact Jaccard similarities of word shingles, and the duplicate index on disk."""

import random
from pathlib import Path

import numpy as np
import pytest

from lit_llama.data.deduplication import DuplicateIndex, band_rows, minhash, text_digest

WORDS = [f"word{i}" for i in range(5000)]


def altered(words: list[str], count: int, source: random.Random) -> list[str]:
    """The words with `count` of them replaced."""
    words = list(words)
    for place in source.sample(range(len(words)), count):
        words[place] = source.choice(WORDS)
    return words


def jaccard(a: list[str], b: list[str]) -> float:
    """Exact similarity of the sets of 5-word shingles."""
    first, second = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a, b))
    return len(first & second) / len(first | second)


def add(index: DuplicateIndex, name: str, text: str):
    return index.add(name, text_digest(text), minhash(text))


def test_signatures_estimate_jaccard_within_the_theory() -> None:
    source = random.Random(0)
    errors = []
    for _ in range(150):
        a = source.choices(WORDS, k=600)
        b = altered(a, source.randint(0, 60), source)
        similarity = jaccard(a, b)
        errors.append((minhash(" ".join(a)) == minhash(" ".join(b))).mean() - similarity)
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 1.2 * np.sqrt(0.25 / 128)  # the largest standard error that a binomial of 128 can have


def test_signature_is_of_the_set_of_shingles() -> None:
    source = random.Random(1)
    words = source.choices(WORDS, k=3000)  # more shingles than one block
    signature = minhash(" ".join(words))
    assert signature.dtype == np.uint32 and signature.shape == (128,)
    assert (minhash("\n".join(words).upper()) == signature).all()
    one_by_one = [minhash(" ".join(words[i : i + 5])) for i in range(len(words) - 4)]
    assert (np.min(one_by_one, axis=0) == signature).all()
    assert (minhash("a b") == minhash("a  b")).all() and (minhash("a b") != minhash("a c")).any()


def test_digest_ignores_white_space_only() -> None:
    assert text_digest("a b\nc") == text_digest(" a\tb  c ")
    assert text_digest("a b c") != text_digest("a b C") != text_digest("a bc")


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_find_99_percent_at_the_threshold(threshold: float) -> None:
    rows = band_rows(threshold)
    bands = 128 // rows
    assert 1 - (1 - threshold**rows) ** bands >= 0.99
    simulated = np.random.default_rng(0).random((4000, bands * rows)) < threshold  # places where two signatures agree
    assert simulated.reshape(4000, bands, rows).all(axis=2).any(axis=1).mean() > 0.98


def test_duplicates_are_found_and_others_kept(tmp_path: Path) -> None:
    source = random.Random(2)
    index = DuplicateIndex(tmp_path / "index", 0.8)
    documents = [source.choices(WORDS, k=source.randint(100, 800)) for _ in range(200)]
    assert [add(index, f"d{i}", " ".join(words)) for i, words in enumerate(documents)] == [None] * 200
    exact = add(index, "copy", "\n".join(documents[17]))
    assert exact == ("d17", 1.0, True)
    for i, words in enumerate(documents):
        near = altered(words, len(words) // 100, source)  # every change touches five shingles
        assert jaccard(words, near) > 0.87
        found = add(index, f"near{i}", " ".join(near))
        assert found is not None and found.of == f"d{i}" and not found.exact and found.similarity >= 0.8
        far = altered(words, len(words) // 8, source)
        assert jaccard(words, far) < 0.55
        assert add(index, f"far{i}", " ".join(far)) is None
    index.close()


def test_without_a_threshold_only_exact_copies_count(tmp_path: Path) -> None:
    index = DuplicateIndex(tmp_path / "index", None)
    assert index.add("a", text_digest("one two three"), None) is None
    assert index.add("b", text_digest("one two three four"), None) is None
    assert index.add("c", text_digest("one  two three"), None) == ("a", 1.0, True)
