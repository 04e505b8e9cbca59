"""Writing GGUF, the file format of llama.cpp: a model, with an adapter merged or none, or a LoRA adapter alone.

`export_model` and `export_adapter` write a file tensor by tensor and read it back before it takes its name: every
tensor must be the source's within the rounding of its type, its logits those of the source, its tokenizer the same. The
base stays mapped from its files; in fp32 there is never more than a decoder layer, or one matrix, in memory.

Names, block types and the way back are `gguf.py`, tokenizers `gguf_tokenizer.py`. The container is written here and not
by the `gguf` package: it is small, users need no package for it, and the tests have one to check it with.
"""

import math
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from lit_llama.answering import adapter_style, adapter_system
from lit_llama.checkpoint import TensorSource, copy_tokenizer, load_model, stored_dtype
from lit_llama.command_line import progress
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError, RunError
from lit_llama.files import atomic_path, refuse_overwrite
from lit_llama.functional import CausalMask
from lit_llama.gguf import (
    BLOCK_TYPES,
    GGUF,
    LAYER_NAMES,
    OTHER_NAMES,
    UNKNOWN,
    half_split_rows,
    model_config,
    read_gguf,
    tensor_sources,
    write_tokenizer,
)
from lit_llama.gguf_tokenizer import tokenizer_metadata
from lit_llama.lora import load_adapter, lora_layers, read_adapter_config
from lit_llama.lora_linear import dense_weight
from lit_llama.model import Llama, rotary_inverse_frequencies
from lit_llama.prompts import detect_style, write_chat_template
from lit_llama.tokenizer import Tokenizer

ALIGNMENT = 32
"""Of each tensor in the file, in bytes; what readers take for granted."""

TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs; it's said that WE'LL see 8,849 of them by 2031.",
    "  Two spaces,\ttabs\n\n\nand lines \r\n ",
    "Zażółć gęślą jaźń — 日本語 🙂👩‍👩‍👧 नमस्ते مرحبا \u00a0 e\u0301 ½ Ⅷ ٣٤",
    "</s><|endoftext|><s>[INST]<|im_start|>user<|eot_id|>",
    "def f(x):\n    return {'a': x**2}  # 1969, 12345.678, 2^10=1024",
    "",
)
"""What the tokenizer in a file must encode as its source does. Logits are compared on the first of them."""


@dataclass(frozen=True)
class Storage:
    """A way to store matrices. Vectors (norms) are F32 in every GGUF file."""

    type_id: int
    """ggml's number of the block type."""
    file_type: int
    """llama.cpp's number of a file whose matrices are of this type (general.file_type)."""
    relative: float
    """Largest rounding error as a share of the weight or, of Q8_0, of the largest weight in its block."""
    absolute: float
    """Largest error on top of that of weights, or of scales, that are subnormal numbers."""


STORAGES = {
    "f32": Storage(0, 0, 0.0, 0.0),
    "f16": Storage(1, 1, 2**-11, 2**-25),
    "bf16": Storage(30, 32, 2**-8, 2**-134),
    # Scale = largest / 127, in F16: half a step, and up to 127 times the rounding of the scale.
    "q8_0": Storage(8, 7, 1 / 254 + 2**-11, 127 * 2**-25),
}


@dataclass(frozen=True)
class Parity:
    """Logits of what was written, read back, against those of the source; both computed in fp32."""

    max_difference: float
    mean_difference: float
    relative: float
    """Root mean square of the differences, as a share of that of the logits around their mean over the vocabulary."""
    limit: float
    """What `relative` may be: twice the error of one matrix product times the square root of how many there are, as
    independent errors add up; fp32's own sums count as 2 ** -20."""

    def __str__(self) -> str:
        return (
            f"logits differ by {self.max_difference:.2g} at most and {self.mean_difference:.2g} on average:"
            f" {self.relative:.2g} of their spread, allowed {self.limit:.2g}"
        )


@dataclass(frozen=True)
class Weight:
    """A tensor to be written."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """Makes it anew, in fp32."""


def export_model(
    checkpoint_dir: Path, adapter_dir: Path | None, out: Path, dtype: str = "bf16", overwrite: bool = False
) -> Parity:
    """Write a model, the adapter merged into it if there is one, with its tokenizer and chat template.

    Args:
        dtype: one of `STORAGES`.

    Raises:
        InputError: what cannot be merged, a tokenizer that llama.cpp does not have, weights that the type cannot hold,
            or a file in the way.
        RunError: what was written does not give the source back; nothing is left of it.
    """
    refuse_overwrite(out, overwrite)
    model = _load(checkpoint_dir, adapter_dir)
    weights = _merged_weights(model)
    tied = "lm_head.weight" not in weights
    config = replace(model.config, tie_word_embeddings=tied)
    tensors = {}
    if config.rope_scaling is not None and config.rope_scaling["rope_type"] == "llama3":
        plain = rotary_inverse_frequencies(replace(config, rope_scaling=None))
        divisors = plain / rotary_inverse_frequencies(config)
        tensors["rope_freqs.weight"] = Weight(tuple(divisors.shape), lambda: divisors)
    for name, weight in weights.items():
        tensors[_gguf_name(name)] = _interleaved(weight, config.head_dim) if _is_rotated(name) else weight
    tokenizer = _tokenizer_as_trained(checkpoint_dir, adapter_dir)
    metadata = _general("model", checkpoint_dir, adapter_dir, dtype) | _model_metadata(config)
    metadata |= tokenizer_metadata(tokenizer, config.vocab_size)
    if config.sliding_window:
        progress(
            "note: llama.cpp lets every token of this architecture attend to all before it: on texts of more than"
            f" {config.sliding_window} tokens, the sliding window, it answers as if there were none"
        )
    with torch.no_grad(), atomic_path(out) as temporary:
        progress(f"writing {config.num_parameters / 1e6:,.1f} million parameters as {dtype}")
        file = _write_and_read_back(temporary, metadata, tensors, dtype)
        _check_tokenizer(file, tokenizer)
        found_config = model_config(file)
        found = tensor_sources(file, found_config, torch.float32)
        if tied:
            found["lm_head.weight"] = found["model.embed_tokens.weight"]
        return _check_logits(found_config, lambda name: _whole(found[name]), model, tokenizer, dtype)


def export_adapter(
    checkpoint_dir: Path, adapter_dir: Path, out: Path, dtype: str = "f32", overwrite: bool = False
) -> Parity:
    """Write a LoRA adapter alone, for llama.cpp to apply to a GGUF of the base while it runs.

    llama.cpp scales each product by adapter.lora.alpha / rank. Where the adapter's own scaling is another (rsLoRA, an
    alpha_pattern), B takes the rest.

    Args:
        dtype: one of `STORAGES`.

    Raises:
        InputError, RunError: as `export_model`; also what is more than low-rank updates (DoRA, weights trained as a
            whole, the head of a tied model), which can only be merged.
    """
    refuse_overwrite(out, overwrite)
    model = _load(checkpoint_dir, adapter_dir)
    config, lora, layers = model.config, model.lora_config, dict(lora_layers(model))
    instead = "export it merged into the model instead (without --adapter_only)"
    if lora.dora or lora.modules_to_save:
        part = "DoRA" if lora.dora else f"{' and '.join(lora.modules_to_save)} trained as a whole"
        raise InputError(f"{adapter_dir}: {part} is more than an adapter in GGUF can hold: {instead}")
    if "lm_head" in layers and config.tie_word_embeddings:
        raise InputError(f"{adapter_dir} adapts the head of a tied model, in llama.cpp the embedding too: {instead}")
    alpha = float(lora.alpha) or 1.0
    tensors = {}
    for name, layer in layers.items():
        lora_A, lora_B = (factor.detach().float() for factor in layer.factors())
        lora_B = lora_B * (layer.scaling * len(lora_A) / alpha)
        for side, factor in (("a", lora_A), ("b", lora_B)):
            weight = Weight(tuple(factor.shape), factor.float)
            rotated = side == "b" and _is_rotated(name)
            new_name = f"{_gguf_name(f'{name}.weight')}.lora_{side}"
            tensors[new_name] = _interleaved(weight, config.head_dim) if rotated else weight
    metadata = _general("adapter", checkpoint_dir, adapter_dir, dtype)
    metadata |= {"adapter.type": "lora", "adapter.lora.alpha": alpha}
    base = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad(), atomic_path(out) as temporary:
        progress(f"writing the adapter of {len(layers)} layers as {dtype}")
        file = _write_and_read_back(temporary, metadata, tensors, dtype)

        def adapted(name: str) -> Tensor:
            layer = layers.get(name.removesuffix(".weight"))
            if layer is None:
                return base[name].float()
            lora_A, lora_B = (_stored(file, f"{_gguf_name(name)}.lora_{side}") for side in "ab")
            if _is_rotated(name):
                lora_B = half_split_rows(lora_B, config.head_dim)
            scaling = file.metadata["adapter.lora.alpha"] / len(lora_A)
            return dense_weight(layer.linear, torch.float32) + scaling * (lora_B @ lora_A)

        return _check_logits(config, adapted, model, Tokenizer.from_checkpoint(checkpoint_dir), dtype)


def _write_and_read_back(path: Path, metadata: dict[str, Any], tensors: dict[str, Weight], dtype: str) -> GGUF:
    """The file as it lies on the disk, whose weights are those that were to be written."""
    write_gguf(path, metadata, tensors, dtype)
    progress("reading it back")
    file = read_gguf(path)
    _check_rounding(file, tensors, dtype)
    return file


def _load(checkpoint_dir: Path, adapter_dir: Path | None) -> Llama:
    """The base, mapped from its files where that is possible, and the adapter on it, not merged."""
    dtype = stored_dtype(checkpoint_dir)
    if adapter_dir is not None and read_adapter_config(adapter_dir).modules_to_save:
        dtype = torch.float32  # which they were trained in, perhaps; the base's dtype would round them
    model = load_model(checkpoint_dir, dtype)
    if adapter_dir is not None:
        load_adapter(model, adapter_dir)
    if getattr(model, "mlp_routing", None) is not None:
        raise InputError(f"{adapter_dir} was trained with routed MLPs, which llama.cpp does not compute: keep it")
    return model


def _merged_weights(model: Llama) -> dict[str, Weight]:
    """The weights of the plain Llama that does the same as a model under LoRA; each is merged when it is made."""
    layers, parameters = dict(lora_layers(model)), dict(model.named_parameters(remove_duplicate=False))
    tied = model.config.tie_word_embeddings and "lm_head" not in layers
    with torch.device("meta"):
        plain = Llama(replace(model.config, tie_word_embeddings=tied))
    weights = {}
    for name, parameter in plain.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        make = parameters[name].detach().float if layer is None else layer.merged_weight
        weights[name] = Weight(tuple(parameter.shape), make)
    return weights


def _tokenizer_as_trained(checkpoint_dir: Path, adapter_dir: Path | None) -> Tokenizer:
    """The checkpoint's tokenizer, with the chat template of the prompt style that the adapter was trained with."""
    style, system = adapter_style(adapter_dir), adapter_system(adapter_dir)
    if style is None or (system is None and style == detect_style(checkpoint_dir)):
        return Tokenizer.from_checkpoint(checkpoint_dir)
    with TemporaryDirectory() as directory:
        copy_tokenizer(checkpoint_dir, Path(directory))
        shutil.copyfile(checkpoint_dir / "config.json", Path(directory) / "config.json")  # may name special ids
        write_chat_template(Path(directory), style, system)
        tokenizer = Tokenizer.from_checkpoint(directory)
    tokenizer.path = checkpoint_dir / tokenizer.path.name  # the same bytes, where the user knows them
    return tokenizer


# --- Names and rows --------------------------------------------------------------------------------------------------

_GGUF_NAMES = {name: other for other, name in (LAYER_NAMES | OTHER_NAMES).items()}


def _gguf_name(name: str) -> str:
    """What llama.cpp calls a parameter."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return f"blk.{layer[1]}.{_GGUF_NAMES[layer[2]]}.weight" if layer else _GGUF_NAMES[name]


def _is_rotated(name: str) -> bool:
    """Whether rotary embedding acts on the rows of a parameter, or of the layer called so."""
    return name.removesuffix(".weight").endswith(("q_proj", "k_proj"))


def interleaved_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection (heads * head_dim, in) in GGUF's order; the inverse of `half_split_rows`."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _interleaved(weight: Weight, head_dim: int) -> Weight:
    return Weight(weight.shape, lambda: interleaved_rows(weight.make(), head_dim))


# --- The container ---------------------------------------------------------------------------------------------------


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, Weight], dtype: str) -> None:
    """Write a GGUF file of version 3, one tensor at a time. For use inside `files.atomic_path`.

    Args:
        metadata: strings, bools, ints (stored as uint32), floats (float32) and lists of one of them (ints: int32).
        dtype: of the matrices, one of `STORAGES`.

    Raises:
        InputError: a matrix has rows that are no whole blocks, or numbers that the type cannot hold; it is named.
    """
    table, end = [], 0
    for name, weight in tensors.items():
        type_id = _type_id(weight, dtype)
        kind = BLOCK_TYPES[type_id]
        if weight.shape[-1] % kind.block_size:
            raise InputError(
                f"{name} has rows of {weight.shape[-1]} weights, which {kind.name} cannot store in blocks of"
                f" {kind.block_size}: choose --dtype f16 or bf16"
            )
        dimensions = struct.pack(f"<I{len(weight.shape)}Q", len(weight.shape), *reversed(weight.shape))
        table.append(_string(name) + dimensions + struct.pack("<IQ", type_id, end))
        size = math.prod(weight.shape) // kind.block_size * kind.layout.itemsize
        end += size + -size % ALIGNMENT
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            type_id, data = _encoded_value(value)
            file.write(_string(key) + struct.pack("<I", type_id) + data)
        file.write(b"".join(table))
        for name, weight in tensors.items():
            file.write(bytes(-file.tell() % ALIGNMENT))
            for rows in _some_rows(weight):
                data = _encoded_weights(rows, BLOCK_TYPES[_type_id(weight, dtype)].name)
                if data is None:
                    raise InputError(f"{name} has numbers that are not finite as {dtype}: choose another --dtype")
                file.write(data.contiguous().view(torch.uint8).numpy())
        file.write(bytes(-file.tell() % ALIGNMENT))


def _some_rows(weight: Weight) -> tuple[Tensor, ...]:
    """A matrix some rows at a time, a vector as one row: what is done with them takes several times their memory."""
    rows = weight.make().view(-1, weight.shape[-1])
    return rows.split(max((1 << 22) // weight.shape[-1], 1))


def _type_id(weight: Weight, dtype: str) -> int:
    return STORAGES[dtype if len(weight.shape) > 1 else "f32"].type_id


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encoded_value(value: Any) -> tuple[int, bytes]:
    """(GGUF's number of the type, bytes) of a value of the metadata."""
    if isinstance(value, list):
        code, item_type = ("i", 5) if isinstance(value[0], int) else ("f", 6)
        if isinstance(value[0], str):
            return 9, struct.pack("<IQ", 8, len(value)) + b"".join(map(_string, value))
        return 9, struct.pack(f"<IQ{len(value)}{code}", item_type, len(value), *value)
    if isinstance(value, str):
        return 8, _string(value)
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    return (6, struct.pack("<f", value)) if isinstance(value, float) else (4, struct.pack("<I", value))


def _encoded_weights(rows: Tensor, kind: str) -> Tensor | None:
    """fp32 rows as they are stored, in a tensor of any dtype; None if a number or a scale becomes infinite or NaN."""
    if kind != "Q8_0":
        stored = rows.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
        return stored if stored.isfinite().all() else None
    blocks = rows.reshape(-1, 32)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    half = scales.half()
    steps = blocks * torch.where(scales > 0, 1 / scales, 0)
    # Halves away from zero, as C's roundf does in ggml; torch.round takes them to even.
    steps = steps.abs().mul_(2).floor_().add_(1).mul_(0.5).floor_().copysign_(steps)
    return torch.cat((half.view(torch.int8), steps.to(torch.int8)), dim=1) if half.isfinite().all() else None


# --- Metadata --------------------------------------------------------------------------------------------------------


def _general(kind: str, checkpoint_dir: Path, adapter_dir: Path | None, dtype: str) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "general.type": kind,
        "general.name": checkpoint_dir.resolve().name + (f" + {adapter_dir.resolve().name}" if adapter_dir else ""),
        "general.file_type": STORAGES[dtype].file_type,
        "general.quantization_version": 2,
    }


def _model_metadata(config: LlamaConfig) -> dict[str, Any]:
    stated = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        stated |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    if scaling.get("rope_type") == "llama3":
        stated["rope.scaling.original_context_length"] = int(scaling["original_max_position_embeddings"])
    if config.sliding_window:
        stated["attention.sliding_window"] = config.sliding_window
    return {f"llama.{key}": value for key, value in stated.items()}


# --- Reading back ----------------------------------------------------------------------------------------------------


def _check_rounding(file: GGUF, tensors: dict[str, Weight], dtype: str) -> None:
    """Each number in the file is what was to be written, within the rounding of the type."""
    for name, weight in tensors.items():
        storage = STORAGES[dtype if len(weight.shape) > 1 else "f32"]
        block_size = BLOCK_TYPES[storage.type_id].block_size
        first = 0
        for rows in _some_rows(weight):
            found = torch.from_numpy(file.rows(name, first, first + len(rows)))
            first += len(rows)
            errors, sizes = (tensor.abs().view(-1, block_size).amax(1) for tensor in (found - rows, rows))
            allowed = storage.relative * sizes + storage.absolute
            if not (errors <= allowed * (1 + 1e-6)).all():  # NaN fails too; the bound is computed in fp32
                raise RunError(f"{name} was not written as it is: off by more than {dtype} rounds; nothing is left")


def _stored(file: GGUF, name: str) -> Tensor:
    """A tensor of the file, dequantized to fp32."""
    shape = file.tensors[name].shape
    return torch.from_numpy(file.rows(name, 0, math.prod(shape[:-1]))).view(shape)


def _whole(source: TensorSource) -> Tensor:
    return torch.cat(list(source.pieces())).view(source.shape)


def _check_tokenizer(file: GGUF, tokenizer: Tokenizer) -> None:
    """The tokenizer in the file encodes, decodes and ends as the one it was made of."""
    with TemporaryDirectory() as directory:
        write_tokenizer(file, Path(directory))
        found = Tokenizer.from_checkpoint(directory)
    for text in TEXTS:
        if found.encode(text) != tokenizer.encode(text):
            raise RunError(f"{tokenizer.path}: written as GGUF, it encodes {text!r} otherwise; nothing is left")
    kinds = file.metadata["tokenizer.ggml.token_type"]
    ids = [token_id for token_id in range(tokenizer.vocab_size) if kinds[token_id] != UNKNOWN]  # shown as each likes
    if [found.bytes_of(token_id) for token_id in ids] != [tokenizer.bytes_of(token_id) for token_id in ids]:
        raise RunError(f"{tokenizer.path}: written as GGUF, it decodes some ids otherwise; nothing is left")
    for name in ("bos_id", "eos_id", "adds_bos", "chat_template"):
        if getattr(found, name) != getattr(tokenizer, name):
            raise RunError(
                f"{tokenizer.path}: written as GGUF, its {name} is {getattr(found, name)!r} instead of"
                f" {getattr(tokenizer, name)!r}; nothing is left"
            )
    if unknown := sorted(tokenizer.stop_ids - found.stop_ids):
        progress(f"note: GGUF has room for three ids that end an answer; not among them: {unknown}")


def _check_logits(
    config: LlamaConfig, found: Callable[[str], Tensor], model: Llama, tokenizer: Tokenizer, dtype: str
) -> Parity:
    """Compare the logits of a plain Llama of the weights that were found with those of the source, adapter and all."""
    ids = tokenizer.encode(TEXTS[0], bos=tokenizer.bos_id is not None)[: config.max_position_embeddings]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.device("meta"):
        plain = Llama(config)
    expected = streamed_logits(model, lambda name: parameters[name].float(), torch.tensor([ids]))
    differences = (streamed_logits(plain, found, torch.tensor([ids])) - expected).abs_()
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    products = 7 * config.num_hidden_layers + 1
    parity = Parity(
        float(differences.max()),
        float(differences.mean()),
        float(differences.square().mean().sqrt() / spread),
        2 * math.sqrt(products) * max(STORAGES[dtype].relative, 2**-20),
    )
    if not parity.relative <= parity.limit:
        raise RunError(f"what was written does not compute what the source does: {parity}; nothing is left")
    return parity


def streamed_logits(model: Llama, weight: Callable[[str], Tensor], input_ids: Tensor) -> Tensor:
    """Logits with the weights of one layer in memory at a time.

    Args:
        model: on the meta device perhaps; its own weights are not used.
        weight: makes the parameter of a name; a tied head is asked for as lm_head.weight.
        input_ids: (1, length) int64.

    Returns:
        (1, length, vocab) in the dtype of the weights.
    """

    def call(name: str, *arguments: Any) -> Tensor:
        module = model.get_submodule(name)
        weights = {own: weight(f"{name}.{own}") for own, _ in module.named_parameters()}
        return functional_call(module, weights, arguments)

    x = call("model.embed_tokens", input_ids)
    cos, sin = model.model.rotary_tables(torch.arange(input_ids.shape[1])[None], x.dtype)
    mask = CausalMask(input_ids.shape[1], None, model.config.sliding_window, x.device)
    for number in range(model.config.num_hidden_layers):
        x = call(f"model.layers.{number}", x, cos, sin, mask, None)
    return call("lm_head", call("model.norm", x))
