"""The tokenizer of a checkpoint directory as the metadata of a GGUF file, for `gguf_writing.py`.

Byte-level BPE becomes llama.cpp's model "gpt2" with the name of its pre-tokenizer; SentencePiece's BPE, in either kind
of file, its model "llama" with scores. The way back is `gguf.write_tokenizer`.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_llama.errors import InputError
from lit_llama.gguf import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, word_splitter
from lit_llama.tokenizer import BYTE_PIECE, CONTROL_TOKEN, Tokenizer, rank_file_to_json

PRE_TOKENIZERS = ("smollm", "llama-bpe", "gpt-2")
"""llama.cpp's names of the ways to split a text into words that are known here, as `gguf.word_splitter` makes them."""


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """A tokenizer and its chat template as GGUF states them.

    Args:
        vocab_size: rows of the embedding; ids that the tokenizer does not use are filled up.

    Raises:
        InputError: llama.cpp has no tokenizer that does the same, or it has ids that the embedding has no rows for.
    """
    if tokenizer.vocab_size > vocab_size:
        raise InputError(f"{tokenizer.path}: {tokenizer.vocab_size} tokens, but the model's embedding has {vocab_size}")
    data = tokenizer.path.read_bytes()
    if tokenizer.path.name == "tokenizer.model" and data.startswith(b"\n"):  # a first field; a rank file is text
        tokens, stated = _sentencepiece(data, tokenizer)
    else:
        if tokenizer.path.name == "tokenizer.model":
            data = rank_file_to_json(data, tokenizer.path)
        tokens, stated = _tokenizers_bpe(json.loads(data), tokenizer.path)
    listed = [tokens.get(token_id, (f"[PAD{token_id}]", UNUSED, 0.0)) for token_id in range(vocab_size)]
    stated["tokens"] = [text for text, _, _ in listed]
    stated["token_type"] = [kind for _, kind, _ in listed]
    if stated["model"] == "llama":
        stated["scores"] = [score for _, _, score in listed]

    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    for role, name in (("unknown", "unk_token"), ("padding", "pad_token")):
        text = tokenizer.special_tokens.get(name)
        ids[role] = tokenizer.special_id(text) if text and tokenizer.has_special(text) else None
    ids |= dict(zip(("eot", "eom"), sorted(tokenizer.stop_ids - {tokenizer.eos_id}), strict=False))
    stated |= {f"{role}_token_id": token_id for role, token_id in ids.items() if token_id is not None}
    stated |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in stated.items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


Tokens = dict[int, tuple[str, int, float]]
"""By id: text, kind and score of a token."""


def _tokenizers_bpe(definition: dict[str, Any], path: Path) -> tuple[Tokens, dict[str, Any]]:
    """A tokenizer.json: byte-level BPE (model "gpt2"), or SentencePiece's BPE in its clothes (model "llama")."""
    model = definition["model"]
    if model["type"] != "BPE":
        raise InputError(f"{path}: a model of type {model['type']}; llama.cpp has only BPE for a Llama")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokens: Tokens = {token_id: (text, NORMAL, 0.0) for text, token_id in model["vocab"].items()}
    if model.get("byte_fallback"):
        # SentencePiece merges the neighbours whose piece has the highest score: the one that comes first here.
        ranks = {"".join(merge): rank for rank, merge in reversed(list(enumerate(merges)))}
        for token_id, (text, _, _) in tokens.items():
            kind = BYTE if BYTE_PIECE.fullmatch(text) else UNKNOWN if text == model["unk_token"] else NORMAL
            tokens[token_id] = (text, kind, -float(ranks.get(text, len(merges))))
        steps = [*_steps(definition.get("normalizer")), *_steps(definition.get("pre_tokenizer"))]
        add_space = any(step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never" for step in steps)
        stated = {"model": "llama", "add_space_prefix": add_space}
    else:
        stated = {"model": "gpt2", "pre": _pre_tokenizer_name(definition, path)}
        stated["merges"] = [" ".join(merge) for merge in merges]
    for token in definition["added_tokens"]:
        if tokens.get(token["id"], ("", NORMAL))[1] != UNKNOWN:
            control = token["special"] or CONTROL_TOKEN.fullmatch(token["content"])
            tokens[token["id"]] = (token["content"], CONTROL if control else USER_DEFINED, 0.0)
    return tokens, stated


def _pre_tokenizer_name(definition: dict[str, Any], path: Path) -> str:
    """What llama.cpp calls the way in which a byte-level tokenizer.json splits texts into words.

    Raises:
        InputError: none of the names that are known here means just that; the message shows what it is.
    """
    steps = [*_steps(definition.get("normalizer")), *_steps(definition.get("pre_tokenizer"))]
    ignores_merges = bool(definition["model"].get("ignore_merges"))
    for name in PRE_TOKENIZERS:
        known = _steps(json.loads(word_splitter(name).__getstate__()))
        if steps == known and ignores_merges == (name == "llama-bpe"):
            return name
    raise InputError(
        f"{path}: llama.cpp has no pre-tokenizer known here ({', '.join(PRE_TOKENIZERS)}) that does"
        f" {' + '.join(json.dumps(step, ensure_ascii=False) for step in steps) or 'nothing'}"
        f"{' and ignores merges' if ignores_merges else ''}"
    )


def _steps(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normaliser or a pre-tokenizer in a tokenizer.json, without what changes no ids."""
    if component is None:
        return []
    steps = next((value for value in component.values() if isinstance(value, list)), [component])
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _sentencepiece(data: bytes, tokenizer: Tokenizer) -> tuple[Tokens, dict[str, Any]]:
    """A SentencePiece model; field numbers from sentencepiece_model.proto."""
    pieces, parts = [], {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(dict(_fields(value)))
        else:
            parts.setdefault(number, {}).update(_fields(value))
    trainer, normalizer = parts.get(2, {}), parts.get(3, {})
    if trainer.get(3, 1) != 2:
        raise InputError(f"{tokenizer.path}: a SentencePiece model that is not of type BPE, all that a Llama has there")
    if normalizer.get(2) or normalizer.get(4, 1):
        name = normalizer.get(1, b"").decode()
        raise InputError(f"{tokenizer.path}: normalises text ({name}, or extra spaces), which llama.cpp does not do")
    tokens: Tokens = {}
    for token_id, piece in enumerate(pieces):
        (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
        tokens[token_id] = (piece[1].decode(), piece.get(3, NORMAL), score)
    for token_id in range(len(pieces), tokenizer.vocab_size):
        if (text := tokenizer.special_text(token_id)) is not None:
            tokens[token_id] = (text, CONTROL, 0.0)
    return tokens, {"model": "llama", "add_space_prefix": bool(normalizer.get(3, 1))}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: (number, int for a varint, else bytes)."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[wire_type] if wire_type != 2 else varint()
        position += size
        yield number, data[position - size : position]
