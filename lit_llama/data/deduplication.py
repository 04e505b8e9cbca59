"""Exact and near duplicates among documents, found in memory that does not grow with their number.

Exact: a hash of the text without regard to white space. Near: MinHash over word shingles (Broder, 1997, "On the
resemblance and containment of documents") estimates the Jaccard similarity of two documents' sets of 5-word shingles;
locality-sensitive hashing of bands of the signature finds the candidates to compare (Leskovec, Rajaraman & Ullman,
"Mining of Massive Datasets", chapter 3). The index is a temporary SQLite file.
"""

import hashlib
import sqlite3
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHINGLE_WORDS = 5
SIGNATURE_LENGTH = 128
MOST_CANDIDATES = 64
CACHE_KIBIBYTES = 16 * 1024

GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Duplicate(NamedTuple):
    """What a document repeats: the name of the earlier one and their estimated similarity (1.0 for an exact copy)."""

    of: str
    similarity: float
    exact: bool


def text_digest(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in white space only."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def minhash(text: str) -> np.ndarray:
    """Signature (128,) uint32 of the set of 5-word shingles, case ignored. The share of equal places estimates Jaccard.

    The standard error of the estimate is sqrt(j (1 - j) / 128), 0.035 at j = 0.8.
    """
    words = text.casefold().split()
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), dtype=np.uint64, count=len(words))
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = np.zeros(count, dtype=np.uint64)
    for i in range(min(SHINGLE_WORDS, len(words))):
        shingles = _mix(shingles + hashes[i : i + count] + GAMMA)
    shingles = np.unique(shingles)
    factors, summands = _permutations()
    signature = np.full(SIGNATURE_LENGTH, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), 512):  # blocks that stay in the processor's cache
        block = shingles[start : start + 512, None] * factors + summands
        np.minimum(signature, block.min(axis=0), out=signature)
    return (signature >> np.uint64(32)).astype(np.uint32)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """Multipliers (odd) and summands of the 128 hash functions; the same in every process."""
    counter = np.arange(1, 2 * SIGNATURE_LENGTH + 1, dtype=np.uint64)
    random = _mix(counter * GAMMA)
    return random[:SIGNATURE_LENGTH] | np.uint64(1), random[SIGNATURE_LENGTH:]


def band_rows(threshold: float) -> int:
    """Most rows a band, so fewest false candidates, with which a pair at the threshold is found with 99 %.

    Two documents of similarity s share at least one of b bands of r rows with probability 1 - (1 - s^r)^b.
    """
    enough = [r for r in range(1, SIGNATURE_LENGTH + 1) if (1 - threshold**r) ** (SIGNATURE_LENGTH // r) <= 0.01]
    return max(enough, default=1)


class DuplicateIndex:
    """All documents accepted so far, in a SQLite file at `path` that must not exist; the caller removes it.

    Args:
        path: Of the index.
        threshold: Similarity, in (0, 1], from which a document is a near duplicate; None to look for exact ones only.
    """

    def __init__(self, path: Path, threshold: float | None) -> None:
        self.threshold = threshold
        self._rows = band_rows(threshold) if threshold is not None else 0
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.executescript(
            f"""
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{CACHE_KIBIBYTES};
            CREATE TABLE documents (id INTEGER PRIMARY KEY, name TEXT, digest BLOB UNIQUE, signature BLOB);
            CREATE TABLE bands (key INTEGER, document INTEGER, PRIMARY KEY (key, document)) WITHOUT ROWID;
            """
        )

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def add(self, name: str, digest: bytes, signature: np.ndarray | None) -> Duplicate | None:
        """Accept a document and return None, or return what it duplicates and leave the index as it is.

        Args:
            name: Of the document, for reports.
            digest: From `text_digest`.
            signature: (128,) uint32 from `minhash`; not used if `threshold` is None.
        """
        found = self._database.execute("SELECT name FROM documents WHERE digest = ?", (digest,)).fetchone()
        if found is not None:
            return Duplicate(found[0], 1.0, exact=True)
        if self.threshold is None:
            self._database.execute("INSERT INTO documents (name, digest) VALUES (?, ?)", (name, digest))
            return None

        keys = self._band_keys(signature)
        candidates = self._database.execute(
            f"""
            SELECT name, signature FROM documents JOIN (
                SELECT document FROM bands WHERE key IN ({",".join("?" * len(keys))})
                GROUP BY document ORDER BY COUNT(*) DESC, document LIMIT {MOST_CANDIDATES}
            ) ON id = document ORDER BY id
            """,
            keys,
        ).fetchall()
        if candidates:
            others = np.frombuffer(b"".join(blob for _, blob in candidates), dtype=np.uint32)
            similarities = (others.reshape(len(candidates), -1) == signature).mean(axis=1)
            best = int(similarities.argmax())
            if similarities[best] >= self.threshold:
                return Duplicate(candidates[best][0], float(similarities[best]), exact=False)
        row = (name, digest, signature.tobytes())
        number = self._database.execute(
            "INSERT INTO documents (name, digest, signature) VALUES (?, ?, ?)", row
        ).lastrowid
        self._database.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(key, number) for key in keys])
        return None

    def _band_keys(self, signature: np.ndarray) -> list[int]:
        bands = signature[: len(signature) // self._rows * self._rows].reshape(-1, self._rows).astype(np.uint64)
        keys = np.arange(len(bands), dtype=np.uint64)
        for column in bands.T:
            keys = _mix(keys + column + GAMMA)
        return keys.astype(np.int64).tolist()
