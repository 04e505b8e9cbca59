"""The whole way from files to a token store, run as a user runs it."""

import gzip
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script
from tokenizers import Tokenizer as ReferenceTokenizer

from lit_llama.data.corpus import CorpusOptions, prepare_corpus
from lit_llama.data.token_store import TokenStore
from lit_llama.errors import InputError

SCRIPT = "scripts/prepare_corpus.py"
END = 0  # <|endoftext|>, which surrounds documents of the tiny tokenizer


def article(number: int, words: int = 60) -> str:
    source = random.Random(number)
    return f"Article {number}. " + " ".join(source.choices([f"word{i}" for i in range(2000)], k=words))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """60 different documents in txt files, in two folders, and a gzipped jsonl file."""
    directory = tmp_path / "documents"
    (directory / "deep").mkdir(parents=True)
    for i in range(20):
        (directory / f"{i:02}.txt").write_text(article(i))
        (directory / f"deep/{i + 20}.md").write_text(article(i + 20))
    rows = "\n".join(json.dumps({"text": article(i + 40)}) for i in range(20))
    (directory / "rows.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return directory


def contents(data_dir: Path) -> dict[str, list[tuple[int, ...]]]:
    """The documents of each split, read with nothing but numpy."""
    found = {}
    for split in ("train", "val"):
        if (data_dir / split).is_dir():
            tokens, offsets = (
                np.fromfile(data_dir / split / "tokens.bin", "<u2"),
                np.load(data_dir / split / "documents.npy"),
            )
            found[split] = [tuple(tokens[a:b].tolist()) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    return found


def digest(data_dir: Path) -> str:
    files = sorted([*data_dir.glob("*/*.bin"), *data_dir.glob("*/*.npy")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_every_document_is_in_the_store_with_exact_tokens(tmp_path: Path, corpus: Path, tiny_checkpoint: Path) -> None:
    data_dir = tmp_path / "data"
    process = run_script(SCRIPT, "--source", corpus, "--checkpoint_dir", tiny_checkpoint, "--data_dir", data_dir)
    reference = ReferenceTokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    texts = [article(i) for i in range(60)]
    expected = {(END, *reference.encode(text).ids, END): text for text in texts}
    found = contents(data_dir)
    assert sorted(found["train"] + found["val"]) == sorted(expected) and len(expected) == 60

    report = json.loads((data_dir / "report.json").read_text())
    meta = json.loads((data_dir / "meta.json").read_text())
    assert report["splits"] == meta["splits"]
    for split, documents in found.items():
        counts = report["splits"][split]
        assert counts["documents"] == len(documents) and counts["tokens"] == sum(map(len, documents))
        assert counts["words"] == sum(len(expected[tokens].split()) for tokens in documents)
        assert counts["bytes"] == sum(len(expected[tokens].encode()) for tokens in documents)
    totals = [sum(counts[unit] for counts in report["splits"].values()) for unit in ("tokens", "words")]
    assert report["tokens_per_word"] == pytest.approx(totals[0] / totals[1], abs=1e-3)
    assert meta["tokenizer"]["sha256"] == hashlib.sha256((tiny_checkpoint / "tokenizer.json").read_bytes()).hexdigest()
    assert f"prepare_corpus.py --source {corpus} --checkpoint_dir" in meta["command"]
    assert f"{report['splits']['train']['tokens']:,}" in process.stdout and "60 documents, 100%" in process.stderr
    assert set(os.listdir(data_dir)) == {"meta.json", "report.json", "train", "val"}
    assert TokenStore.open(data_dir, "train", meta["tokenizer"]["sha256"]).num_documents == len(found["train"])


def test_the_store_is_the_same_for_any_number_of_workers(tmp_path: Path, corpus: Path, tiny_checkpoint: Path) -> None:
    for i in range(700):  # enough for several chunks
        (corpus / f"more{i}.txt").write_text(article(1000 + i, 20))
    digests = set()
    for workers in (1, 2):
        prepare_corpus([corpus], tmp_path / f"{workers}", CorpusOptions(tiny_checkpoint), workers=workers)
        digests.add(digest(tmp_path / f"{workers}"))
    assert len(digests) == 1


def test_duplicates_are_removed_and_counted(tmp_path: Path, corpus: Path, tiny_checkpoint: Path) -> None:
    (corpus / "zcopy.txt").write_text(article(3).replace(" ", "\n"))
    (corpus / "znear.txt").write_text(article(44) + " and one more")
    report = prepare_corpus([corpus], tmp_path / "data", CorpusOptions(tiny_checkpoint), workers=1)
    assert (report["exact_duplicates"], report["near_duplicates"], report["documents_read"]) == (1, 1, 62)
    pairs = {Path(entry["document"]).name: Path(entry["of"]).name for entry in report["duplicate_examples"]}
    assert pairs == {"zcopy.txt": "03.txt", "znear.txt": "rows.jsonl.gz#5"}
    assert sum(counts["documents"] for counts in report["splits"].values()) == 60
    options = CorpusOptions(tiny_checkpoint, near_duplicate_threshold=None)
    report = prepare_corpus([corpus], tmp_path / "exact", options, workers=1)
    assert (report["exact_duplicates"], report["near_duplicates"]) == (1, 0)


def test_more_documents_do_not_reshuffle_the_split(tmp_path: Path, tiny_checkpoint: Path) -> None:
    directory = tmp_path / "documents"
    directory.mkdir()
    splits = []
    for count in (150, 300):
        for i in range(count):
            (directory / f"{i}.txt").write_text(article(i, 20))
        data_dir = tmp_path / f"{count}"
        prepare_corpus([directory], data_dir, CorpusOptions(tiny_checkpoint), val_fraction=0.2, workers=1)
        splits.append({tokens: split for split, documents in contents(data_dir).items() for tokens in documents})
    assert all(splits[1][tokens] == split for tokens, split in splits[0].items())
    share = list(splits[1].values()).count("val") / 300
    assert 0.12 < share < 0.28
    other = tmp_path / "other"
    prepare_corpus([directory], other, CorpusOptions(tiny_checkpoint), val_fraction=0.2, seed=1, workers=1)
    assert set(contents(other)["val"]) != {tokens for tokens, split in splits[1].items() if split == "val"}


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_each_split_gets_a_document(tmp_path: Path, corpus: Path, tiny_checkpoint: Path, fraction: float) -> None:
    prepare_corpus([corpus], tmp_path / "data", CorpusOptions(tiny_checkpoint), val_fraction=fraction, workers=1)
    found = contents(tmp_path / "data")
    assert sorted(map(len, found.values())) == [1, 59]


def test_one_document_and_no_held_out_ones(tmp_path: Path, corpus: Path, tiny_checkpoint: Path) -> None:
    one, options = corpus / "00.txt", CorpusOptions(tiny_checkpoint)
    with pytest.raises(InputError, match="one document only .*00.txt.*--val_fraction 0"):
        prepare_corpus([one], tmp_path / "data", options, workers=1)
    assert not (tmp_path / "data").exists()
    prepare_corpus([one], tmp_path / "data", options, val_fraction=0, workers=1)
    assert list(contents(tmp_path / "data")) == ["train"]
    prepare_corpus([corpus], tmp_path / "all", options, val_fraction=0, workers=1)
    assert len(contents(tmp_path / "all")["train"]) == 60


def test_held_out_documents_of_their_own(tmp_path: Path, corpus: Path, tiny_checkpoint: Path) -> None:
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    (heldout / "new.txt").write_text(article(500))
    (heldout / "also_in_corpus.txt").write_text(article(7))
    (heldout / "near_one_in_corpus.txt").write_text(article(8) + " and one more")
    options, data_dir = CorpusOptions(tiny_checkpoint), tmp_path / "data"
    arguments = ["--source", corpus, "--val_source", heldout, "--checkpoint_dir", tiny_checkpoint, "--workers", 1]
    run_script(SCRIPT, *arguments, "--data_dir", data_dir)
    found = contents(data_dir)
    assert len(found["val"]) == 3 and len(found["train"]) == 58
    report = json.loads((data_dir / "report.json").read_text())
    assert (report["exact_duplicates"], report["near_duplicates"]) == (1, 1)
    assert {Path(entry["document"]).name for entry in report["duplicate_examples"]} == {"07.txt", "08.txt"}
    with pytest.raises(InputError, match="no document for train"):
        prepare_corpus([corpus / "07.txt"], tmp_path / "none", options, val_sources=[corpus / "07.txt"], workers=1)
    assert not (tmp_path / "none").exists()


def test_bad_files_are_reported_and_the_rest_is_used(tmp_path: Path, corpus: Path, tiny_checkpoint: Path) -> None:
    (corpus / "binary.txt").write_bytes(b"\0\1\2" * 100)
    (corpus / "notes.docx").write_bytes(b"PK")
    (corpus / "old.txt").write_bytes("a caf\u00e9 of long ago, read as Windows text".encode("cp1252"))
    (corpus / "short.txt").write_text("tiny")
    (corpus / "bad.jsonl").write_text('{"txt": "no"}\n{"txt": "no"}\n{"text": "short"}\n')
    data_dir = tmp_path / "data"
    arguments = ["--checkpoint_dir", tiny_checkpoint, "--data_dir", data_dir, "--workers", 1, "--min_characters", 20]
    process = run_script(SCRIPT, "--source", corpus, *arguments)
    report = json.loads((data_dir / "report.json").read_text())
    skipped = {(Path(entry["file"]).name, entry["reason"]): entry.get("rows") for entry in report["skipped"]}
    assert skipped == {
        ("binary.txt", "binary (NUL bytes)"): None,
        ("notes.docx", "unknown suffix '.docx'"): None,
        ("short.txt", "too short (under 20 characters)"): None,
        ("bad.jsonl", "no key 'text'"): 2,
        ("bad.jsonl", "too short (under 20 characters)"): 1,
    }
    assert report["read_as_windows_1252"] == 1 and report["documents_read"] == 61
    assert f"binary (NUL bytes): 1 files ({corpus}/binary.txt)" in process.stdout
    assert f"no key 'text': 2 rows of 1 files ({corpus}/bad.jsonl)" in process.stdout


def test_nothing_left_is_an_error_and_writes_nothing(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/a.bin").write_bytes(b"x")
    arguments = ["--checkpoint_dir", tiny_checkpoint, "--data_dir", tmp_path / "out/data", "--workers", 1]
    process = run_script(SCRIPT, "--source", tmp_path / "documents", *arguments, check=False)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: no text in") and "unknown suffix '.bin'" in process.stderr
    assert process.stderr.count("\n") == 1
    assert [path for path in tmp_path.rglob("*") if "out" in str(path.relative_to(tmp_path)) and path.is_file()] == []
    with pytest.raises(InputError, match="missing: no such file or folder"):
        prepare_corpus([tmp_path / "missing"], tmp_path / "out/data", CorpusOptions(tiny_checkpoint), workers=1)


def test_sources_are_given_as_a_shell_gives_them(tmp_path: Path, corpus: Path, tiny_checkpoint: Path) -> None:
    files = [corpus / "00.txt", corpus / "01.txt", corpus / "02.txt"]
    arguments = ["--checkpoint_dir", tiny_checkpoint, "--workers", 1]
    run_script(SCRIPT, f"--source={files[0]}", *arguments, "--source", *files[1:], "--data_dir", tmp_path / "data")
    assert sum(map(len, contents(tmp_path / "data").values())) == 3


def test_existing_output_and_sources_are_safe(tmp_path: Path, corpus: Path, tiny_checkpoint: Path) -> None:
    options, data_dir = CorpusOptions(tiny_checkpoint), tmp_path / "data"
    prepare_corpus([corpus], data_dir, options, workers=1)
    before = digest(data_dir)
    with pytest.raises(InputError, match="--overwrite"):
        prepare_corpus([corpus / "00.txt"], data_dir, options, val_fraction=0, workers=1)
    with pytest.raises(InputError, match="not a token store"):
        prepare_corpus([corpus], corpus, options, workers=1, overwrite=True)
    shutil.copytree(corpus, data_dir / "documents")
    with pytest.raises(InputError, match="lies in the output"):
        prepare_corpus([data_dir / "documents"], data_dir, options, workers=1, overwrite=True)
    assert digest(data_dir) == before
    prepare_corpus([corpus / "00.txt"], data_dir, options, val_fraction=0, workers=1, overwrite=True)
    assert sum(map(len, contents(data_dir).values())) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"val_fraction": 1.0}, "--val_fraction"),
        ({"workers": 0}, "--workers"),
        ({"seed": -1}, "--seed"),
        ({"near_duplicate_threshold": 0.0}, "--near_duplicate_threshold"),
    ],
)
def test_arguments_out_of_range(
    tmp_path: Path, corpus: Path, tiny_checkpoint: Path, arguments: dict, message: str
) -> None:
    threshold = arguments.pop("near_duplicate_threshold", 0.8)
    with pytest.raises(InputError, match=message):
        options = CorpusOptions(tiny_checkpoint, near_duplicate_threshold=threshold)
        prepare_corpus([tmp_path / "documents"], tmp_path / "data", options, **arguments)
    assert not (tmp_path / "data").exists()


def test_a_missing_reader_says_what_to_install(tmp_path: Path, corpus: Path, tiny_checkpoint: Path) -> None:
    (corpus / "page.html").write_text("<p>text")
    (tmp_path / "selectolax.py").write_text("raise ImportError")
    arguments = ["--checkpoint_dir", tiny_checkpoint, "--data_dir", tmp_path / "data", "--workers", 2]
    process = run_script(SCRIPT, "--source", corpus, *arguments, check=False, env={"PYTHONPATH": str(tmp_path)})
    assert process.returncode == 2 and "pip install 'lit-llama[documents]'" in process.stderr
    assert process.stderr.count("\n") == 1 and not (tmp_path / "data").exists()
