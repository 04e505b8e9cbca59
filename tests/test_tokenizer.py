"""`lit_llama.tokenizer` against sentencepiece and transformers on the same files, and tiktoken by definition."""

import json
import random
import shutil
from pathlib import Path

import pytest
from tokenizer_files import (
    hard_texts,
    tiktoken_ids,
    toy_ranks,
    write_llama_json,
    write_rank_file,
    write_sentencepiece,
)

from lit_llama.errors import InputError
from lit_llama.tokenizer import Tokenizer

KINDS = ("sentencepiece", "sentencepiece-bare", "prepend", "first", "always", "ranks", "byte-level")
TEXTS = hard_texts(1500)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Path]:
    """A checkpoint directory with a tokenizer of each kind, by name."""
    root = tmp_path_factory.mktemp("tokenizers")
    llama = write_sentencepiece(root / "sentencepiece")
    return {
        "sentencepiece": llama,
        "sentencepiece-bare": write_sentencepiece(root / "bare", add_dummy_prefix=False),
        "ranks": write_rank_file(root / "ranks"),
        "byte-level": tiny_checkpoint,
        **{scheme: write_llama_json(llama, root / scheme, scheme) for scheme in ("prepend", "first", "always")},
    }


@pytest.fixture(scope="module")
def tokenizers(checkpoints: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.from_checkpoint(path) for kind, path in checkpoints.items()}


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream()
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_of_any_text(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    encoded = tokenizer.encode_batch(TEXTS)
    assert [tokenizer.decode(ids) for ids in encoded] == TEXTS
    assert [tokenizer.encode(text) for text in TEXTS[:200]] == encoded[:200]
    if tokenizer.bos_id is not None:
        assert tokenizer.decode(tokenizer.encode(" a\n", bos=True, eos=True)) == " a\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_is_to_the_space_what_it_says(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    for text in (" Oslo", "Oslo", "  x", "é", " 🙂"):
        decoder = tokenizer.stream(continuation=True)
        ids = tokenizer.encode(text, continuation=True)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == text


@pytest.mark.parametrize("kind", KINDS)
def test_stream_adds_up_to_decode_without_half_characters(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    for text in TEXTS[:400]:
        pieces = stream(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert pieces[-1] == "" and text.count("\ufffd") == sum(piece.count("\ufffd") for piece in pieces)
    rng = random.Random(1)
    for _ in range(300):  # ids that are no text: broken characters at any place, special tokens between them
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-bare"])
def test_sentencepiece_ids_and_text(kind: str, checkpoints: dict[str, Path], tokenizers: dict[str, Tokenizer]) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(checkpoints[kind] / "tokenizer.model"))
    tokenizer = tokenizers[kind]
    texts = [text for text in TEXTS if "\u2581" not in text]
    assert tokenizer.encode_batch(texts) == [reference.encode(text) for text in texts]
    assert [tokenizer.decode(reference.encode(text)) for text in texts] == [
        reference.decode(reference.encode(text)) for text in texts
    ]
    answer = reference.encode("The river")[1:]  # an answer begins in the middle of a sequence
    assert tokenizer.decode(answer) == reference.decode(answer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (reference.vocab_size(), 1, 2)


def test_bytes_that_are_no_text_decode_as_transformers_does(
    checkpoints: dict[str, Path], tokenizers: dict[str, Tokenizer]
) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(checkpoints["byte-level"])
    rng = random.Random(2)
    for _ in range(300):
        ids = [rng.randrange(320) for _ in range(rng.randrange(12))]
        assert tokenizers["byte-level"].decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_sentencepiece_spells_its_boundary_mark_in_bytes(tokenizers: dict[str, Tokenizer]) -> None:
    """The one character whose ids differ from SentencePiece's: there it becomes a space."""
    tokenizer = tokenizers["sentencepiece"]
    boundary = tokenizer.encode("\u2581")
    assert [tokenizer.bytes_of(token_id) for token_id in boundary] == [b"\xe2", b"\x96", b"\x81"]
    assert tokenizer.encode("the\u2581the") == tokenizer.encode("the") + boundary + tokenizer.encode(
        "the", continuation=True
    )


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "byte-level"])
def test_json_ids_and_text_equal_transformers(
    kind: str, checkpoints: dict[str, Path], tokenizers: dict[str, Tokenizer]
) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(checkpoints[kind], split_special_tokens=True)
    tokenizer = tokenizers[kind]
    texts = [text for text in TEXTS if kind == "byte-level" or "\u2581" not in text]
    if kind in ("first", "always"):  # where Metaspace does not tell " a" from "a"
        texts = [text for text in texts if not text.startswith(" ")]
    expected = reference(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.decode(ids) for ids in expected] == reference.batch_decode(expected, skip_special_tokens=True)
    assert tokenizer.vocab_size == len(reference)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_token_id, reference.eos_token_id)


@pytest.mark.parametrize("scheme", ["prepend", "first", "always"])
def test_json_of_a_sentencepiece_vocabulary_gives_sentencepiece_ids(
    scheme: str, tokenizers: dict[str, Tokenizer]
) -> None:
    texts = [text for text in TEXTS if "\x00" not in text]
    assert tokenizers[scheme].encode_batch(texts) == tokenizers["sentencepiece"].encode_batch(texts)
    for text in (" a", "a b", "  a"):
        expected = tokenizers["sentencepiece"].encode(text, continuation=True)
        assert tokenizers[scheme].encode(text, continuation=True) == expected


def test_rank_file_ids_follow_tiktoken(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, ranks = tokenizers["ranks"], toy_ranks()
    assert tokenizer.encode_batch(TEXTS) == [tiktoken_ids(text, ranks) for text in TEXTS]
    special = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|finetune_right_pad_id|>": 4,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
    }
    assert {text: tokenizer.special_id(text) - len(ranks) for text in special} == special
    assert tokenizer.vocab_size == len(ranks) + 256
    assert tokenizer.stop_ids == {len(ranks) + 1, len(ranks) + 8, len(ranks) + 9}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.document_start_id, tokenizer.document_end_id)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_text_stay_text(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    specials = [
        text for text in ("<s>", "</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>") if tokenizer.has_special(text)
    ]
    assert specials
    for text in specials:
        for context in (text, f"a{text}", f" {text} ", text * 2):
            ids = tokenizer.encode(context)
            assert tokenizer.special_id(text) not in ids
            assert tokenizer.decode(ids) == context


def test_control_tokens_that_are_not_marked_special_stay_text_too(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    definition = json.loads((checkpoints["byte-level"] / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    definition["added_tokens"] += [
        {"id": 320 + n, "content": text, **flags} for n, text in enumerate(["<|tool|>", "km²"])
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = Tokenizer.from_checkpoint(tmp_path)
    assert tokenizer.special_id("<|tool|>") == 320 and 320 not in tokenizer.encode("a<|tool|>")
    assert tokenizer.decode([320]) == "" and tokenizer.decode(tokenizer.encode("a<|tool|>")) == "a<|tool|>"
    assert 321 in tokenizer.encode("25 km²") and tokenizer.decode(tokenizer.encode("25 km²")) == "25 km²"


@pytest.mark.parametrize("kind", KINDS)
def test_bos_and_eos_come_once_and_only_when_asked_for(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    plain = tokenizer.encode("The river")
    assert tokenizer.bos_id not in plain
    assert tokenizer.encode("The river", bos=True) == [tokenizer.bos_id, *plain]
    assert tokenizer.encode_batch(["The river", ""], bos=True, eos=True) == [
        [tokenizer.bos_id, *plain, tokenizer.eos_id],
        [tokenizer.bos_id, tokenizer.eos_id],
    ]


def test_default_bos_follows_the_files(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    adds_bos = {kind: Tokenizer.from_checkpoint(path).adds_bos for kind, path in checkpoints.items()}
    assert adds_bos == {kind: kind != "byte-level" for kind in KINDS}
    directory = shutil.copytree(checkpoints["prepend"], tmp_path / "copy")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    assert not Tokenizer.from_checkpoint(directory).adds_bos


def test_ids_with_a_role(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    chat = Tokenizer.from_checkpoint(checkpoints["byte-level"])  # <|endoftext|> 0, <|im_start|> 1 (BOS), <|im_end|> 2
    assert (chat.bos_id, chat.eos_id, chat.stop_ids) == (1, 2, {2})
    assert (chat.document_start_id, chat.document_end_id) == (0, 0)

    directory = shutil.copytree(checkpoints["sentencepiece"], tmp_path / "copy")
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (directory / "config.json").write_text('{"eos_token_id": 9, "bos_token_id": 5}')
    added = {"600": {"content": "<|im_start|>"}, "601": {"content": "<|im_end|>"}}
    settings = {"eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": added}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_checkpoint(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 601, {2, 7, 9, 601})
    assert (tokenizer.document_start_id, tokenizer.document_end_id) == (1, 2)
    assert (
        tokenizer.vocab_size == 602 and tokenizer.decode([600, *tokenizer.encode("a<|im_end|>"), 601]) == "a<|im_end|>"
    )
    assert {path.name for path in tokenizer.files} == {
        "tokenizer.model",
        "tokenizer_config.json",
        "generation_config.json",
    }

    (tmp_path / "bare").mkdir()
    shutil.copy(checkpoints["byte-level"] / "tokenizer.json", tmp_path / "bare")
    assert Tokenizer.from_checkpoint(tmp_path / "bare").bos_id is None
    (tmp_path / "bare" / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 0]}')
    bare = Tokenizer.from_checkpoint(tmp_path / "bare")
    assert (bare.bos_id, bare.eos_id, bare.stop_ids) == (1, 2, {0, 2})


def test_json_wins_over_model_and_the_hash_is_that_of_the_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import hashlib

    shutil.copy(checkpoints["sentencepiece"] / "tokenizer.model", tmp_path)
    assert Tokenizer.from_checkpoint(tmp_path).path.name == "tokenizer.model"
    shutil.copy(checkpoints["byte-level"] / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer.from_checkpoint(tmp_path)
    assert tokenizer.vocab_size == 320
    assert tokenizer.sha256 == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()


def test_files_that_lose_text_lose_exactly_that(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """NFKC folds characters, a vocabulary without bytes forgets the ones it does not have, and nothing else is lost."""
    folding = Tokenizer.from_checkpoint(write_sentencepiece(tmp_path / "nfkc", normalization_rule_name="nfkc"))
    assert folding.decode(folding.encode("ﬁve ｋｍ the river")) == "five km the river"
    no_bytes = Tokenizer.from_checkpoint(
        write_sentencepiece(tmp_path / "no-bytes", byte_fallback=False, vocab_size=340, character_coverage=1.0)
    )
    assert no_bytes.decode(no_bytes.encode("the 漢 river")) == "the  \u2047  river"

    definition = json.loads((checkpoints["byte-level"] / "tokenizer.json").read_text())
    del definition["model"]["vocab"]["\u0104"]  # how byte 4 is spelled, which SmolLM2 for one has no token for
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    without_4 = Tokenizer.from_checkpoint(tmp_path)
    assert without_4.decode(without_4.encode("a\x04b\x05")) == "ab\x05"


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_what_cannot_be_encoded_or_decoded_is_named(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    with pytest.raises(InputError, match=r"lone surrogate \('\\ud83d' at character 2"):
        tokenizer.encode("ab\ud83dc")
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode_batch(["fine", "\udcff"])
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(InputError, match=rf"no token {token_id}; ids go from 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([5, token_id])
        with pytest.raises(InputError, match="no token"):
            tokenizer.stream().push(token_id)
    with pytest.raises(InputError, match="no special token '<|no|>'"):
        tokenizer.special_id("<|no|>")


def test_files_that_cannot_be_used_are_named(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    def refusal(name: str, data: bytes, **others: str) -> str:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        (directory / name).write_bytes(data)
        for other, text in others.items():
            (directory / f"{other}.json").write_text(text)
        with pytest.raises(InputError) as caught:
            Tokenizer.from_checkpoint(directory)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    ranks = (checkpoints["ranks"] / "tokenizer.model").read_bytes()
    definition = (checkpoints["byte-level"] / "tokenizer.json").read_bytes()
    assert "no tokenizer.json and no tokenizer.model" in refusal("notes.txt", b"")
    assert "not a tokenizer.json" in refusal("tokenizer.json", definition[:-100])
    assert "neither a SentencePiece model nor" in refusal("tokenizer.model", b"\x00\x01binary\xff" * 50)
    model = (checkpoints["sentencepiece"] / "tokenizer.model").read_bytes()
    assert "neither a SentencePiece model nor" in refusal("tokenizer.model", model[: len(model) // 2])
    assert "neither a SentencePiece model nor" in refusal("tokenizer.model", b"")
    assert "line 301: not a base64 token" in refusal(
        "tokenizer.model", b"".join(ranks.splitlines(True)[:300]) + b"Zm9v\n"
    )
    assert "with all 256 bytes" in refusal("tokenizer.model", b"".join(ranks.splitlines(True)[9:]))
    wordpiece = json.loads(definition) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    assert "decoder WordPiece" in refusal("tokenizer.json", json.dumps(wordpiece).encode())
    assert "not valid JSON" in refusal("tokenizer.json", definition, tokenizer_config="{")
    assert "no token '<|nope|>'" in refusal("tokenizer.json", definition, tokenizer_config='{"bos_token": "<|nope|>"}')


def test_bos_of_a_tokenizer_without_one(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    shutil.copy(checkpoints["byte-level"] / "tokenizer.json", tmp_path)
    with pytest.raises(InputError, match="no beginning-of-sequence token"):
        Tokenizer.from_checkpoint(tmp_path).encode("a", bos=True)
