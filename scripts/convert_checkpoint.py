"""Turn a GGUF file, a Meta folder or a folder of .bin files into a Hugging Face directory of safetensors.

The one place of the project that opens pickles: `.pth` and `.bin` files, as weights only, memory-mapped. Tensors are
converted one at a time, so a model larger than memory can be converted.
"""

import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_llama import gguf
from lit_llama.checkpoint import TensorSource, check_tensors, copy_tokenizer, write_config, write_tensors
from lit_llama.command_line import progress, run
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.files import atomic_directory, read_json, refuse_overwrite, write_json
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer


def main(
    *,
    source: Path,
    out_dir: Path,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    tokenizer_from: Path | None = None,
    max_position_embeddings: int | None = None,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint to a Hugging Face directory.

    Args:
        source: A .gguf file of architecture llama; or a folder of Meta's with params.json and consolidated.*.pth; or a
            Hugging Face folder with pytorch_model*.bin.
        out_dir: The directory to write.
        dtype: Of the stored weights.
        tokenizer_from: A directory whose tokenizer files to take instead of the source's own.
        max_position_embeddings: Context length of a Llama 1 (2048) or 2 (4096) in Meta's format, which does not say.
        overwrite: Replace what is in out_dir.
    """
    refuse_overwrite(out_dir, overwrite)
    torch_dtype = getattr(torch, dtype)
    file = gguf.read_gguf(source) if source.is_file() else None
    if file is not None:
        config = gguf.model_config(file)
        tensors = gguf.tensor_sources(file, config, torch_dtype)
    elif (source / "params.json").is_file():
        tokenizer_from = tokenizer_from or meta_tokenizer_directory(source)
        config, tensors = read_meta(
            source, torch_dtype, Tokenizer.from_checkpoint(tokenizer_from), max_position_embeddings
        )
    elif any(source.glob("pytorch_model*.bin")):
        tokenizer_from = tokenizer_from or source
        config = LlamaConfig.from_json(source)
        tensors = read_bin(source, torch_dtype, config.tie_word_embeddings)
    else:
        raise InputError(
            f"{source}: neither a .gguf file, nor a folder with params.json and consolidated.*.pth, nor one with"
            " pytorch_model*.bin"
        )
    with torch.device("meta"):
        model = Llama(config)
    check_tensors({name: tensor.shape for name, tensor in tensors.items()}, model, source)

    with atomic_directory(out_dir, overwrite) as directory:
        if tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, directory)
        else:
            gguf.write_tokenizer(file, directory)
        if not (directory / "generation_config.json").exists() and config.token_ids:
            write_json(directory / "generation_config.json", config.token_ids)
        write_config(directory, config, torch_dtype)
        progress(f"converting {config.num_parameters / 1e6:,.1f} million parameters of {source} to {dtype}")
        write_tensors(directory, tensors)
    print(out_dir)


_META_LAYER_NAMES = {
    # name: (Hugging Face's name, dimension along which model-parallel files split it)
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
_META_WITHOUT_EFFECT = {"ffn_dim_multiplier", "multiple_of", "max_batch_size", "max_seq_len", "vocab_size"}


def read_meta(
    source: Path, dtype: torch.dtype, tokenizer: Tokenizer, max_position_embeddings: int | None
) -> tuple[LlamaConfig, dict[str, TensorSource]]:
    """Configuration and tensors of a folder as Meta distributes Llama 1, 2, 3, 3.1 and 3.2.

    Raises:
        InputError: a file is missing, or params.json states something this project does not implement.
    """
    shards = [load_pickle(path) for path in sorted(source.glob("consolidated.*.pth"))]
    if not shards:
        raise InputError(f"{source}: no consolidated.*.pth beside params.json")
    params = read_json(source / "params.json")
    if lacking := [name for name in ("dim", "n_layers", "n_heads", "norm_eps") if not params.get(name)]:
        raise InputError(f"{source / 'params.json'}: {lacking[0]} is missing")
    head_dim = params["dim"] // params["n_heads"]
    tensors = {}
    for name, first in shards[0].items():
        layer = re.fullmatch(r"layers\.(\d+)\.(\w+(?:\.\w+)?)\.weight", name)
        if name == "rope.freqs":
            continue
        elif layer and layer[2] in _META_LAYER_NAMES:
            part, split_dim = _META_LAYER_NAMES[layer[2]]
            new_name = f"model.layers.{layer[1]}.{part}.weight"
        elif name == "tok_embeddings.weight":
            # Llama 1 and 2 split the embedding by columns, Llama 3 by rows.
            new_name, split_dim = "model.embed_tokens.weight", 1 if first.shape[1] < params["dim"] else 0
        elif name == "output.weight":
            new_name, split_dim = "lm_head.weight", 0
        elif name == "norm.weight":
            new_name, split_dim = "model.norm.weight", None
        else:
            raise InputError(f"{source}: the tensor {name} has no place in a Llama")
        for number, shard in enumerate(shards):
            if name not in shard:
                raise InputError(f"{source}/consolidated.{number:02d}.pth: the tensor {name} is missing")
        parts = [shard[name] for shard in shards] if split_dim is not None else [first]
        shape = list(first.shape)
        if split_dim is not None:
            shape[split_dim] = sum(part.shape[split_dim] for part in parts)
        rotary_head_dim = head_dim if layer and layer[2] in ("attention.wq", "attention.wk") else None
        tensors[new_name] = TensorSource(tuple(shape), dtype, partial(joined, parts, split_dim, rotary_head_dim))

    # Llama 3.2 1B and 3B are tied, and their files hold the matrix twice.
    if "lm_head.weight" in tensors and len(shards) == 1:
        if torch.equal(shards[0]["output.weight"], shards[0]["tok_embeddings.weight"]):
            del tensors["lm_head.weight"]
    return meta_config(source, params, tensors, tokenizer, max_position_embeddings), tensors


def meta_config(
    source: Path,
    params: dict[str, Any],
    tensors: dict[str, TensorSource],
    tokenizer: Tokenizer,
    max_position_embeddings: int | None,
) -> LlamaConfig:
    """The configuration in params.json; widths come from the tensors, where Meta computes or omits them."""
    params = {name: value for name, value in params.items() if name not in _META_WITHOUT_EFFECT}
    vocab_size, hidden_size = tensors["model.embed_tokens.weight"].shape
    tied = "lm_head.weight" not in tensors
    heads = params.pop("n_heads")
    rope_theta = params.pop("rope_theta", 10000.0)
    rope_scaling = None
    if params.pop("use_scaled_rope", False):
        rope_scaling = {
            "rope_type": "llama3",
            # Before params.json had a field for it, only the model cards said: 8 in Llama 3.1, 32 in the tied 3.2.
            "factor": float(params.pop("rope_scaling_factor", None) or (32 if tied else 8)),
            "low_freq_factor": 1.0,
            "high_freq_factor": float(params.pop("rope_high_freq_factor", None) or 4),
            "original_max_position_embeddings": 8192,
        }
    if max_position_embeddings is None:
        if rope_theta == 10000:
            raise InputError(
                f"{source / 'params.json'} does not tell Llama 1 from Llama 2:"
                " pass --max_position_embeddings 2048 or 4096"
            )
        # Llama 3.1 and later, Llama 3, CodeLlama.
        max_position_embeddings = 131072 if rope_scaling else 8192 if rope_theta == 500000 else 16384
    config = LlamaConfig(
        hidden_size=params.pop("dim"),
        num_hidden_layers=params.pop("n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=params.pop("n_kv_heads", None) or heads,
        intermediate_size=tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=params.pop("norm_eps"),
        tie_word_embeddings=tied,
        token_ids={"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_ids)},
    )
    if params:
        name, value = next(iter(params.items()))
        raise InputError(f"{source / 'params.json'}: {name} = {value!r} is not supported")
    return config


def meta_tokenizer_directory(source: Path) -> Path:
    """Where the tokenizer.model of a Meta folder lies: in it, or (Llama 1 and 2) beside it."""
    for directory in (source, source.resolve().parent):
        if (directory / "tokenizer.model").is_file():
            return directory
    raise InputError(f"{source}: no tokenizer.model in it or beside it; pass --tokenizer_from")


def joined(parts: list[Tensor], split_dim: int | None, rotary_head_dim: int | None) -> list[Tensor]:
    """The whole tensor of its model-parallel parts, query and key rows in Hugging Face's order."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=split_dim)
    return [whole if rotary_head_dim is None else gguf.half_split_rows(whole, rotary_head_dim)]


def read_bin(source: Path, dtype: torch.dtype, tied: bool) -> dict[str, TensorSource]:
    """Tensors of a Hugging Face folder with pytorch_model*.bin files; nothing is renamed."""
    tensors = {}
    for path in sorted(source.glob("pytorch_model*.bin")):
        for name, tensor in load_pickle(path).items():
            if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight"):
                tensors[name] = TensorSource(tuple(tensor.shape), dtype, partial(joined, [tensor], None, None))
    return tensors


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a torch.save file, mapped; nothing but tensors is unpickled."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: not a readable file of weights ({str(error).splitlines()[0]}); download it again"
        ) from None


if __name__ == "__main__":
    run(main)
