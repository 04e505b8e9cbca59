"""Reading GGUF, the file format of llama.cpp: metadata, tensors, dequantization, and the tokenizer inside.

A file is magic and version, then key-value metadata, then a table of tensors, then their data, all little-endian
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

`read_gguf` gives the parts as they are; `model_config`, `tensor_sources` and `write_tokenizer` translate a file of
architecture "llama" into what a Hugging Face directory holds. Writing the directory is `scripts/convert_checkpoint.py`;
writing GGUF, `gguf_writing.py`.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_llama.checkpoint import TensorSource
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.files import write_json
from lit_llama.model import rotary_inverse_frequencies
from lit_llama.tokenizer import LLAMA3_WORDS


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies in the file, and how it is stored."""

    shape: tuple[int, ...]
    """In the order of PyTorch: rows first (the file has it reversed)."""
    block_type: "BlockType"
    start: int
    """First byte, from the beginning of the file."""


@dataclass(frozen=True)
class GGUF:
    """The contents of a GGUF file; tensor data stays in the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of a tensor as fp32, dequantized."""
        tensor = self.tensors[name]
        kind = tensor.block_type
        blocks_per_row = tensor.shape[-1] // kind.block_size
        with open(self.path, "rb") as file:
            file.seek(tensor.start + first * blocks_per_row * kind.layout.itemsize)
            blocks = np.fromfile(file, kind.layout, (last - first) * blocks_per_row)
        return kind.decode(blocks).reshape(last - first, tensor.shape[-1])


def read_gguf(path: Path | str) -> GGUF:
    """Read the header of a GGUF file of version 2 or 3.

    Raises:
        InputError: not such a file, truncated, or a tensor of a type that is not supported (named).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                metadata, table, end_of_header = _read_header(_Cursor(data, 4), path)
            except (struct.error, IndexError):
                raise InputError(f"{path}: truncated inside its header; download it again") from None
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: damaged header ({error})") from None

    alignment = metadata.get("general.alignment", 32)
    start_of_data = -(-end_of_header // alignment) * alignment
    tensors = {}
    for name, shape, type_id, offset in table:
        if type_id not in BLOCK_TYPES:
            kind = OTHER_TYPES.get(type_id, f"number {type_id}")
            supported = ", ".join(kind.name for kind in BLOCK_TYPES.values())
            raise InputError(f"{path}: {name} is stored as {kind}, which is not supported; supported: {supported}")
        block_type = BLOCK_TYPES[type_id]
        if shape[-1] % block_type.block_size:
            raise InputError(f"{path}: {name} of shape {shape} cannot be stored in blocks of {block_type.block_size}")
        tensors[name] = GGUFTensor(shape, block_type, start_of_data + offset)
        end = tensors[name].start + math.prod(shape) // block_type.block_size * block_type.layout.itemsize
        if end > size:
            raise InputError(
                f"{path}: truncated: {size} bytes, the tensor {name} ends at byte {end}; download it again"
            )
    return GGUF(path, metadata, tensors)


class _Cursor:
    """A position in mapped bytes that moves as values are read."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data, self.position = data, position

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.number("Q")
        if length > len(self.data) - self.position:
            raise IndexError("string beyond the end of the file")
        self.position += length
        return self.data[self.position - length : self.position].decode()

    def value(self, type_id: int) -> Any:
        if type_id == 8:
            return self.string()
        if type_id == 9:
            item_type, length = self.number("I"), self.number("Q")
            return [self.value(item_type) for _ in range(length)]
        return self.number(_NUMBER_CODES[type_id])


_NUMBER_CODES = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")


def _read_header(cursor: _Cursor, path: Path) -> tuple[dict[str, Any], list[tuple], int]:
    """Metadata, (name, shape, type, offset) of each tensor, and where the header ends."""
    version = cursor.number("I")
    if version not in (2, 3):
        raise InputError(f"{path}: GGUF version {version} (or big-endian) is not supported; supported: 2 and 3")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    table = []
    for _ in range(num_tensors):
        name = cursor.string()
        shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
        table.append((name, shape, cursor.number("I"), cursor.number("Q")))
    return metadata, table, cursor.position


# --- Blocks of quantized weights -------------------------------------------------------------------------------------
# Layouts: ggml's ggml-common.h. Each decoder takes n blocks and returns n * block_size weights in fp32, with the
# operations in the order that makes the result bit-equal to ggml's.


@dataclass(frozen=True)
class BlockType:
    """How a run of weights is stored."""

    name: str
    block_size: int
    """Weights a block."""
    layout: np.dtype
    """Bytes of a block."""
    decode: Callable[[np.ndarray], np.ndarray]


def _nibbles(packed: np.ndarray, width: int) -> np.ndarray:
    """uint8 (n, m) to (n, 2 m): of every `width` bytes first the low halves, then the high ones."""
    packed = packed.reshape(len(packed), -1, width)
    return np.concatenate((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)


def _scale(blocks: np.ndarray, name: str) -> np.ndarray:
    return blocks[name].astype(np.float32)[:, None]


def _decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    return _scale(blocks, "d") * (_nibbles(blocks["q"], 16).astype(np.float32) - 8)


def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    return _scale(blocks, "d") * _nibbles(blocks["q"], 16) + _scale(blocks, "m")


def _five_bits(blocks: np.ndarray) -> np.ndarray:
    fifth = (blocks["high"][:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return (_nibbles(blocks["q"], 16) | (fifth << 4)).astype(np.float32)


def _decode_q5_0(blocks: np.ndarray) -> np.ndarray:
    return _scale(blocks, "d") * (_five_bits(blocks) - 16)


def _decode_q5_1(blocks: np.ndarray) -> np.ndarray:
    return _scale(blocks, "d") * _five_bits(blocks) + _scale(blocks, "m")


def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    return _scale(blocks, "d") * blocks["q"]


def _sub_block_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of the 8 sub-blocks of Q4_K and Q5_K, fp32 (n, 8, 1) each.

    12 bytes hold 2 x 8 numbers of 6 bits: the first four of each in the low bits of bytes 0-3 and 4-7, the last four
    with their low bits in the halves of bytes 8-11 and their high bits on top of bytes 0-3 and 4-7.
    """
    scales, minima, rest = blocks["scales"].reshape(-1, 3, 4).swapaxes(0, 1)
    scales = np.concatenate((scales & 63, (rest & 15) | (scales >> 6 << 4)), axis=-1)
    minima = np.concatenate((minima & 63, (rest >> 4) | (minima >> 6 << 4)), axis=-1)
    return (_scale(blocks, "d") * scales)[..., None], (_scale(blocks, "dmin") * minima)[..., None]


def _decode_q4_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _sub_block_scales(blocks)
    return scales * _nibbles(blocks["q"], 32).reshape(-1, 8, 32) - minima


def _decode_q5_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _sub_block_scales(blocks)
    fifth = (blocks["high"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return scales * (_nibbles(blocks["q"], 32).reshape(-1, 8, 32) | (fifth << 4)) - minima


def _decode_q6_k(blocks: np.ndarray) -> np.ndarray:
    scales = (_scale(blocks, "d") * blocks["scales"])[..., None]
    high = blocks["high"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None] & 3
    q = (_nibbles(blocks["q"], 64) | (high.reshape(-1, 256) << 4)).astype(np.float32) - 32
    return scales * q.reshape(-1, 16, 16)


def _decode_bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.astype(np.uint32) << 16).view(np.float32)


def _as_float32(blocks: np.ndarray) -> np.ndarray:
    return blocks.astype(np.float32)


BLOCK_TYPES = {
    0: BlockType("F32", 1, np.dtype("<f4"), _as_float32),
    1: BlockType("F16", 1, np.dtype("<f2"), _as_float32),
    2: BlockType("Q4_0", 32, np.dtype([("d", "<f2"), ("q", "u1", 16)]), _decode_q4_0),
    3: BlockType("Q4_1", 32, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]), _decode_q4_1),
    6: BlockType("Q5_0", 32, np.dtype([("d", "<f2"), ("high", "<u4"), ("q", "u1", 16)]), _decode_q5_0),
    7: BlockType("Q5_1", 32, np.dtype([("d", "<f2"), ("m", "<f2"), ("high", "<u4"), ("q", "u1", 16)]), _decode_q5_1),
    8: BlockType("Q8_0", 32, np.dtype([("d", "<f2"), ("q", "i1", 32)]), _decode_q8_0),
    12: BlockType(
        "Q4_K", 256, np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("q", "u1", 128)]), _decode_q4_k
    ),
    13: BlockType(
        "Q5_K",
        256,
        np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("high", "u1", 32), ("q", "u1", 128)]),
        _decode_q5_k,
    ),
    14: BlockType(
        "Q6_K", 256, np.dtype([("q", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]), _decode_q6_k
    ),
    30: BlockType("BF16", 1, np.dtype("<u2"), _decode_bf16),
}
"""What can be read, by ggml's type number."""

OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""Names for the refusal of what cannot."""


# --- Architecture "llama" as a Hugging Face checkpoint ---------------------------------------------------------------


def model_config(gguf: GGUF) -> LlamaConfig:
    """The configuration that a file of architecture "llama" states.

    Raises:
        InputError: another architecture, or something in the file that a Llama of this project does not compute.
    """
    metadata = gguf.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{gguf.path}: general.architecture is {architecture!r}; only 'llama' is supported")
    if metadata.get("split.count", 1) > 1:
        raise InputError(
            f"{gguf.path}: one of {metadata['split.count']} parts; join them with llama-gguf-split --merge"
        )
    stated = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    if stated.get("expert_count"):
        raise InputError(f"{gguf.path}: a mixture of {stated['expert_count']} experts is not supported")
    required = (
        "embedding_length",
        "block_count",
        "attention.head_count",
        "feed_forward_length",
        "context_length",
        "attention.layer_norm_rms_epsilon",
    )
    for key in required:
        if not isinstance(stated.get(key), int | float):
            raise InputError(f"{gguf.path}: llama.{key} = {stated.get(key)!r}; expected one number for all layers")
    if "token_embd.weight" not in gguf.tensors:
        raise InputError(f"{gguf.path}: the tensor token_embd.weight is missing")

    heads = stated["attention.head_count"]
    head_dim = stated.get("attention.key_length", stated["embedding_length"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if stated.get(key, head_dim) != head_dim:
            raise InputError(f"{gguf.path}: llama.{key} = {stated[key]} differs from the head size {head_dim}")
    ids = _token_ids(metadata)
    try:
        config = LlamaConfig(
            hidden_size=stated["embedding_length"],
            num_hidden_layers=stated["block_count"],
            num_attention_heads=heads,
            num_key_value_heads=stated.get("attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate_size=stated["feed_forward_length"],
            vocab_size=gguf.tensors["token_embd.weight"].shape[0],
            max_position_embeddings=stated["context_length"],
            rope_theta=_shortest(stated.get("rope.freq_base", 10000.0)),
            rms_norm_eps=_shortest(stated["attention.layer_norm_rms_epsilon"]),
            sliding_window=stated.get("attention.sliding_window") or None,
            tie_word_embeddings="output.weight" not in gguf.tensors,
            model_type="mistral" if stated.get("attention.sliding_window") else "llama",
            token_ids={f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids},
        )
    except InputError as error:
        raise InputError(f"{gguf.path}: {error}") from None
    config.rope_scaling = _rope_scaling(gguf, config, stated)
    return config


def _shortest(value: float) -> float:
    """The decimal number that was meant by an fp32 number: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(gguf: GGUF, config: LlamaConfig, stated: dict[str, Any]) -> dict[str, Any] | None:
    if "rope_freqs.weight" in gguf.tensors:
        # Llama 3.1's scaling is stored as what it divides each frequency by. Its parameters are published constants
        # except the factor, which is the divisor of the lowest frequency.
        (divisors,) = gguf.rows("rope_freqs.weight", 0, 1)
        scaling = {
            "rope_type": "llama3",
            "factor": _shortest(divisors[-1]),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": stated.get("rope.scaling.original_context_length", 8192),
        }
        plain = rotary_inverse_frequencies(config)
        config.rope_scaling = scaling
        expected = (plain / rotary_inverse_frequencies(config)).numpy()
        if expected.shape != divisors.shape or not np.allclose(expected, divisors, rtol=1e-4):
            raise InputError(f"{gguf.path}: rope_freqs.weight is not the scaling of Llama 3.1; not supported")
        return scaling
    kind = stated.get("rope.scaling.type", "linear" if "rope.scale_linear" in stated else "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise InputError(
            f"{gguf.path}: llama.rope.scaling.type = {kind!r} is not supported (supported: linear, llama3)"
        )
    factor = stated.get("rope.scaling.factor", stated.get("rope.scale_linear", 1.0))
    return None if factor == 1 else {"rope_type": "linear", "factor": _shortest(factor)}


LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def tensor_sources(gguf: GGUF, config: LlamaConfig, dtype: torch.dtype) -> dict[str, TensorSource]:
    """The file's tensors under Hugging Face's names, dequantized a few rows at a time when they are written.

    Raises:
        InputError: a tensor that has no place in a Llama.
    """
    sources = {}
    for name, tensor in gguf.tensors.items():
        if name == "rope_freqs.weight":
            continue
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if layer and layer[2] in LAYER_NAMES:
            new_name = f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight"
        elif name in OTHER_NAMES:
            new_name = OTHER_NAMES[name]
        else:
            raise InputError(f"{gguf.path}: the tensor {name} has no place in a Llama")
        head_dim = config.head_dim if layer and layer[2] in ("attn_q", "attn_k") else None
        sources[new_name] = TensorSource(tensor.shape, dtype, partial(_pieces, gguf, name, config.head_dim, head_dim))
    return sources


def _pieces(gguf: GGUF, name: str, multiple: int, rotary_head_dim: int | None) -> Iterator[Tensor]:
    """A tensor's rows, dequantized, about a million weights and a `multiple` of rows at a time."""
    shape = gguf.tensors[name].shape
    num_rows = math.prod(shape[:-1])
    step = max((1 << 20) // shape[-1] // multiple, 1) * multiple
    for first in range(0, num_rows, step):
        rows = torch.from_numpy(gguf.rows(name, first, min(first + step, num_rows)))
        yield rows if rotary_head_dim is None else half_split_rows(rows, rotary_head_dim)


def half_split_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection in Hugging Face's order, (heads * head_dim, in).

    Meta and GGUF rotate the pairs (0, 1), (2, 3), ... of a head; Hugging Face (0, d/2), (1, d/2 + 1), ...
    """
    return weight.view(-1, head_dim // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


# --- Tokenizer -------------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, the same numbers in GGUF and SentencePiece."""

_GPT2_WORDS = ("gpt-2", "default")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def write_tokenizer(gguf: GGUF, directory: Path) -> None:
    """Write the tokenizer inside the file: tokenizer.json or tokenizer.model, and its two configuration files.

    Raises:
        InputError: the file has none, or one of a kind that is not supported (named).
    """
    metadata = gguf.metadata
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if model not in ("gpt2", "llama") or not tokens:
        raise InputError(
            f"{gguf.path}: tokenizer.ggml.model = {model!r} is not supported (supported: gpt2, llama);"
            " pass --tokenizer_from with a directory that holds the tokenizer"
        )
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    pre_tokenizer = metadata.get("tokenizer.ggml.pre")
    # llama.cpp's own defaults for files that do not say.
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or pre_tokenizer in _LLAMA3_NAMES)
    ids = _token_ids(metadata)
    special = {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "unk", "pad") if name in ids}
    if model == "gpt2":
        _write_tokenizer_json(gguf, directory, tokens, kinds, special.get("bos_token") if add_bos else None)
    else:
        scores = metadata.get("tokenizer.ggml.scores", [0.0] * len(tokens))
        add_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
        (directory / "tokenizer.model").write_bytes(_sentencepiece_model(tokens, scores, kinds, add_space))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if model == "gpt2" else "LlamaTokenizer",
        **special,
        "add_bos_token": add_bos,
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get("llama.context_length", 2048),
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    write_json(directory / "tokenizer_config.json", config)
    stop_ids = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "pad") if name in ids}
    if stop_ids:
        generation["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else stop_ids
    write_json(directory / "generation_config.json", generation)


def _token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The ids of tokens with a role: bos, eos, unk, pad, and eot, eom, which also end an answer."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    # Some writers state 2**32 - 1 where there is no such token.
    size = len(metadata.get("tokenizer.ggml.tokens", ()))
    return {name: token_id for name, token_id in ids.items() if token_id is not None and token_id < size}


def word_splitter(name: str | None) -> Any:
    """How a byte-level BPE splits texts into words, by llama.cpp's name for it, as a step of the `tokenizers` library;
    None for a name that is not known here."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in _LLAMA3_NAMES)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name in _LLAMA3_NAMES:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"), byte_level])
    return pre_tokenizers.Sequence([byte_level]) if name in _GPT2_WORDS else None


def _write_tokenizer_json(gguf: GGUF, directory: Path, tokens: list[str], kinds: list[int], bos: str | None) -> None:
    """A byte-level BPE as the `tokenizers` library stores it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    name = gguf.metadata.get("tokenizer.ggml.pre")
    words = word_splitter(name)
    if words is None:
        raise InputError(
            f"{gguf.path}: tokenizer.ggml.pre = {name!r} is not supported (supported: smollm,"
            f" {', '.join(_LLAMA3_NAMES + _GPT2_WORDS)});"
            " pass --tokenizer_from with a directory that holds the tokenizer"
        )
    if "tokenizer.ggml.merges" not in gguf.metadata:
        raise InputError(f"{gguf.path}: a tokenizer of model 'gpt2' without tokenizer.ggml.merges")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in gguf.metadata["tokenizer.ggml.merges"]]
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in _LLAMA3_NAMES))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{gguf.path}: damaged tokenizer ({error})") from None
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    tokenizer.save(str(directory / "tokenizer.json"))


def _sentencepiece_model(tokens: list[str], scores: list[float], kinds: list[int], add_space: bool) -> bytes:
    """A SentencePiece BPE model as a serialized ModelProto; field numbers from sentencepiece_model.proto."""
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + _field(2, float(score)) + _field(3, kind))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    )
    byte_fallback = BYTE in kinds
    trainer = _field(3, 2) + _field(4, len(tokens)) + _field(35, int(byte_fallback))  # model type BPE, size
    for field, default, kind in ((40, 0, UNKNOWN), (41, 1, CONTROL), (42, 2, CONTROL)):  # ids of unk, bos, eos
        present = default < len(kinds) and kinds[default] == kind
        trainer += _field(field, default if present else -1)
        if present:
            trainer += _field(field + 5, tokens[default].encode())
    trainer += _field(43, -1)  # pad
    normalizer = _field(1, b"identity") + _field(3, int(add_space)) + _field(4, 0) + _field(5, 1)
    return pieces + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer (https://protobuf.dev/programming-guides/encoding)."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
