"""The token store on disk: read back by plain numpy, refused when it does not fit, never left half written."""

import json
from pathlib import Path

import numpy as np
import pytest

from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError

TOKENIZER = "a" * 64


def write(data_dir: Path, documents: list, vocab_size: int = 1000, **options) -> Path:
    """`documents`: (split, tokens, loss mask or None)."""
    with TokenStoreWriter(data_dir, vocab_size, TOKENIZER, "checkpoints/some", sources=["x.txt"], **options) as writer:
        for split, tokens, mask in documents:
            writer.add(split, tokens, mask, num_words=2, num_bytes=10)
    return data_dir


@pytest.mark.parametrize("vocab_size, dtype", [(1000, "<u2"), (65536, "<u2"), (65537, "<u4"), (128256, "<u4")])
def test_files_hold_the_documents_in_the_documented_format(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    documents = [[1, 2, vocab_size - 1], [5], list(range(700))]
    store_dir = write(
        tmp_path / "store", [("train", tokens, None) for tokens in documents] + [("val", [7, 8], None)], vocab_size
    )
    assert np.fromfile(store_dir / "train/tokens.bin", dtype=dtype).tolist() == sum(documents, [])
    assert np.load(store_dir / "train/documents.npy").tolist() == [0, 3, 4, 704]
    assert not (store_dir / "train/loss_mask.bin").exists()
    meta = json.loads((store_dir / "meta.json").read_text())
    assert meta["tokenizer"] == {"sha256": TOKENIZER, "source": "checkpoints/some"}
    counts = {"documents": 3, "tokens": 704, "words": 6, "bytes": 30, "loss_mask": False, "groups": False}
    assert meta["splits"]["train"] == counts
    assert (meta["vocab_size"], meta["sources"]) == (vocab_size, ["x.txt"])

    store = TokenStore.open(store_dir, "train", TOKENIZER)
    assert (store.num_documents, store.num_tokens, store.num_words, store.num_bytes) == (3, 704, 6, 30)
    assert [store.document(i)[0].tolist() for i in range(3)] == documents
    assert store.document(2)[1] is None
    assert TokenStore.open(store_dir, "val").document(0)[0].tolist() == [7, 8]
    with pytest.raises(IndexError):
        store.document(3)


def test_a_loss_mask_that_begins_late_covers_the_documents_before_it(tmp_path: Path) -> None:
    documents = [("train", [1, 2, 3], None), ("train", [4, 5], [0, 1]), ("train", [6], None), ("val", [1], [1])]
    store_dir = write(tmp_path / "store", documents)
    assert np.fromfile(store_dir / "train/loss_mask.bin", dtype="u1").tolist() == [1, 1, 1, 0, 1, 1]
    assert not (store_dir / "val/loss_mask.bin").exists()
    assert TokenStore.open(store_dir, "train").document(1)[1].tolist() == [0, 1]


def test_another_tokenizer_is_refused_with_both_hashes(tmp_path: Path) -> None:
    store_dir = write(tmp_path / "store", [("train", [1, 2], None)])
    with pytest.raises(InputError, match=f"(?s){TOKENIZER}.*checkpoints/some.*{'b' * 64}"):
        TokenStore.open(store_dir, "train", "b" * 64)


def write_groups(data_dir: Path, groups: list) -> Path:
    with TokenStoreWriter(data_dir, 1000, TOKENIZER, "checkpoints/some") as writer:
        for group in groups:
            writer.add("train", [1, 2], group=group)
        writer.add("val", [1, 2])
    return data_dir


def test_groups_are_kept_only_where_some_document_has_one(tmp_path: Path) -> None:
    store_dir = write_groups(tmp_path / "store", [None, 7, 0, 7])
    assert np.load(store_dir / "train/groups.npy").tolist() == [-1, 7, 0, 7]
    assert TokenStore.open(store_dir, "train").groups.tolist() == [-1, 7, 0, 7]
    assert not (store_dir / "val/groups.npy").exists() and TokenStore.open(store_dir, "val").groups is None
    with pytest.raises(ValueError, match="group -1"):
        write_groups(tmp_path / "other", [-1])
    np.save(store_dir / "train/groups.npy", np.array([1, 2, 3]))
    with pytest.raises(InputError, match="groups.npy: not the groups of 4 documents"):
        TokenStore.open(store_dir, "train")
    (store_dir / "train/groups.npy").unlink()
    with pytest.raises(InputError, match="groups.npy: cannot be read"):
        TokenStore.open(store_dir, "train")
    meta = json.loads((store_dir / "meta.json").read_text())
    for counts in meta["splits"].values():  # as stores were before there were groups
        del counts["groups"]
    (store_dir / "meta.json").write_text(json.dumps(meta))
    assert TokenStore.open(store_dir, "train").groups is None


def break_tokens(store_dir: Path) -> None:
    file = store_dir / "train/tokens.bin"
    file.write_bytes(file.read_bytes()[:-1])


def break_offsets(store_dir: Path) -> None:
    np.save(store_dir / "train/documents.npy", np.array([0, 4, 3], dtype=np.int64))


def cut_offsets(store_dir: Path) -> None:
    file = store_dir / "train/documents.npy"
    file.write_bytes(file.read_bytes()[:20])


def change_version(store_dir: Path) -> None:
    meta = json.loads((store_dir / "meta.json").read_text())
    (store_dir / "meta.json").write_text(json.dumps(meta | {"format_version": 7}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_tokens, "tokens.bin: 5 bytes, meta.json promises 6"),
        (lambda store_dir: (store_dir / "train/loss_mask.bin").unlink(), "loss_mask.bin: missing"),
        (break_offsets, "documents.npy: not the offsets"),
        (cut_offsets, "documents.npy: cannot be read"),
        (change_version, "format version 7"),
        (lambda store_dir: (store_dir / "meta.json").unlink(), "not a token store"),
        (lambda store_dir: (store_dir / "meta.json").write_text("{"), "not valid JSON"),
    ],
)
def test_a_damaged_store_is_refused(tmp_path: Path, damage, message: str) -> None:
    store_dir = write(tmp_path / "store", [("train", [1, 2], None), ("train", [3], [0])])
    damage(store_dir)
    with pytest.raises(InputError, match=message):
        TokenStore.open(store_dir, "train")


def test_a_missing_split_names_those_that_exist(tmp_path: Path) -> None:
    store_dir = write(tmp_path / "store", [("train", [1, 2], None)])
    with pytest.raises(InputError, match="no split 'val', only: train"):
        TokenStore.open(store_dir, "val")


def test_a_failure_leaves_nothing_and_an_old_store_as_it_was(tmp_path: Path) -> None:
    store_dir = tmp_path / "store"
    with pytest.raises(ValueError, match="token id"):
        write(store_dir, [("train", [1, 2], None), ("train", [1000], None)])
    with pytest.raises(InputError, match="no document"):
        write(store_dir, [])
    assert list(tmp_path.iterdir()) == []

    write(store_dir, [("train", [1, 2], None)])
    with pytest.raises(InputError, match="--overwrite"):
        write(store_dir, [("train", [3], None)])
    with pytest.raises(ValueError, match="zeros and ones"):
        write(store_dir, [("train", [3], [2])], overwrite=True)
    assert TokenStore.open(store_dir, "train").document(0)[0].tolist() == [1, 2]
    write(store_dir, [("train", [3], None)], overwrite=True)
    assert TokenStore.open(store_dir, "train").document(0)[0].tolist() == [3]
    assert list(tmp_path.iterdir()) == [store_dir]


def test_overwrite_never_replaces_what_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not a token store"):
        write(tmp_path / "documents", [("train", [3], None)], overwrite=True)
    assert (tmp_path / "documents/thesis.txt").read_text() == "mine"
