"""Checkpoint directories in Hugging Face's layout: load a model, save one, tell two apart.

    config.json
    model.safetensors, or model-00001-of-0000N.safetensors and model.safetensors.index.json
    tokenizer.json and/or tokenizer.model, tokenizer_config.json, generation_config.json

A safetensors file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}} and the
tensors' bytes (https://github.com/huggingface/safetensors#format). It is read and written here directly, so that a
tensor can be mapped, or converted piece by piece, without ever being in memory twice.

Reading other formats is `lit_llama/gguf.py` and `scripts/convert_checkpoint.py`; adapters are `lit_llama/lora.py`.
"""

import ctypes
import hashlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.files import atomic_directory, read_json, write_json
from lit_llama.mlp_partition import MLPPartition
from lit_llama.model import Llama
from lit_llama.tokenizer import COMPANION_FILES

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE_BYTES = 4 << 20
"""How much of a tensor is held at once while it is converted or moved."""


def load_model(
    checkpoint_dir: Path | str,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    embeddings: str | None = None,
) -> Llama:
    """Read a checkpoint directory in place.

    Tensors already in `dtype` are mapped from the file on a CPU (copy on write: the file never changes); others are
    converted or moved a few megabytes at a time. Either way memory peaks at the model's own bytes, nearly.

    Args:
        checkpoint_dir: a Hugging Face directory of type llama or mistral with safetensors.
        dtype: of all weights that are not quantized.
        device: where the weights go.
        quantize: None, or "nf4", "nf4-dq", "int4", "int8": the linear layers inside the blocks, one at a time while
            reading.
        embeddings: None, or "int8": embedding and head in 8 bits; "cpu": the embedding stays in the host's memory.

    Returns:
        The model in eval mode, no parameter requiring a gradient, `fingerprint` set.

    Raises:
        InputError: something is missing, damaged or of another shape; names the file and the tensor.
    """
    checkpoint_dir = Path(checkpoint_dir)
    config = LlamaConfig.from_json(existing_directory(checkpoint_dir))
    stored = model_tensors(checkpoint_dir, config.tie_word_embeddings)
    with torch.device("meta"):
        model = Llama(config)
    check_tensors({name: tensor.shape for name, tensor in stored.items()}, model, checkpoint_dir)

    device = torch.device(device)
    mappings: dict[Path, mmap.mmap] = {}
    for name, parameter in list(model.named_parameters()):
        if quantize is not None and parameter.ndim == 2 and name.startswith("model.layers."):
            _set_quantized(model, name, stored[name], dtype, device, quantize)
        elif embeddings is not None and name in ("model.embed_tokens.weight", "lm_head.weight"):
            _set_embedding(model, name, stored[name], dtype, device, embeddings)
        else:
            weight = _mapped_or_read(stored[name], dtype, device, mappings)
            module_name, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module_name), attribute, nn.Parameter(weight, requires_grad=False))
    if config.tie_word_embeddings and embeddings is None:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.fingerprint = _fingerprint(stored)
    model.mlp_partition = MLPPartition.load(checkpoint_dir)
    return model.eval()


def save_checkpoint(
    model: Llama,
    checkpoint_dir: Path | str,
    tokenizer_from: Path | str | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write a checkpoint directory that this project and transformers open; complete or not at all.

    Args:
        model: a plain Llama: adapters merged, nothing quantized.
        tokenizer_from: a checkpoint directory whose tokenizer and generation files are copied.
        dtype: of the stored weights; by default each parameter's own.
        max_shard_size: bytes of tensors in one file.

    Raises:
        InputError: the directory holds something and `overwrite` is false, or the model is not a plain Llama.
    """
    with torch.device("meta"):
        plain = [name for name, _ in Llama(model.config).named_parameters()]
    parameters = dict(model.named_parameters())
    if foreign := sorted(parameters.keys() ^ set(plain)):
        raise InputError(
            f"cannot save the model: {foreign[0]} is not as in a plain Llama; merge or remove what wraps it"
        )
    tensors = {
        name: TensorSource(tuple(parameters[name].shape), dtype or parameters[name].dtype, _single(parameters[name]))
        for name in plain
    }
    with atomic_directory(checkpoint_dir, overwrite) as directory:
        write_config(directory, model.config, tensors["model.embed_tokens.weight"].dtype)
        write_tensors(directory, tensors, max_shard_size)
        if (partition := getattr(model, "mlp_partition", None)) is not None:
            partition.save(directory)
        if tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, directory)


def fingerprint(checkpoint_dir: Path | str) -> str:
    """Hexadecimal SHA-256 by which an adapter knows its base: the same however the tensors are split into files.

    Taken over the name, dtype, shape and first 4096 bytes of every stored tensor, so it is quick for any size.
    """
    config = LlamaConfig.from_json(existing_directory(checkpoint_dir))
    return _fingerprint(model_tensors(checkpoint_dir, config.tie_word_embeddings))


def stored_dtype(checkpoint_dir: Path | str) -> torch.dtype:
    """The dtype in which a checkpoint's weights are stored (that of its embedding)."""
    config = LlamaConfig.from_json(existing_directory(checkpoint_dir))
    stored = model_tensors(checkpoint_dir, config.tie_word_embeddings)
    if "model.embed_tokens.weight" not in stored:
        raise InputError(f"{checkpoint_dir}: the tensor model.embed_tokens.weight is missing")
    return stored["model.embed_tokens.weight"].dtype


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a safetensors file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, from the beginning of the file."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        """The tensor flat and in order, a few megabytes at a time."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            left = self.num_bytes
            while left:
                buffer = bytearray(min(left, PIECE_BYTES))
                if file.readinto(buffer) != len(buffer):
                    raise InputError(f"{self.path}: ends inside the tensor {self.name}; download or write it again")
                left -= len(buffer)
                yield torch.frombuffer(buffer, dtype=self.dtype)


def model_tensors(checkpoint_dir: Path | str, tied: bool) -> dict[str, StoredTensor]:
    """The tensors in a checkpoint's files that belong to a model, by name, whatever their shapes.

    Rotary tables that old versions of transformers stored are left out; so is the head of a tied model.
    """
    stored: dict[str, StoredTensor] = {}
    for path, wanted in _tensor_files(Path(checkpoint_dir)):
        tensors = read_header(path)
        for name in wanted if wanted is not None else tensors:
            if name not in tensors:
                raise InputError(f"{path}: the tensor {name}, which the index places here, is missing")
            stored[name] = tensors[name]
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    if tied and (head := stored.pop("lm_head.weight", None)) is not None:
        # Some writers keep the head's name for the one matrix of a tied model.
        stored.setdefault("model.embed_tokens.weight", head)
    return stored


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        InputError: not a safetensors file, truncated, or a dtype that is not floating point of 16 to 64 bits.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            header_size = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise InputError(f"{path}: a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'")
            if len(prefix) < 8 or header_size > size - 8:
                raise InputError(
                    f"{path}: truncated or not a safetensors file ({size} bytes); download or write it again"
                )
            header = json.loads(file.read(header_size))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the checkpoint is incomplete, download or write it again") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(
            f"{path}: not a safetensors file (its header is not JSON); download or write it again"
        ) from None

    tensors, end_of_data = {}, 8 + header_size
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise InputError(f"{path}: {name} is stored as {entry['dtype']}; supported are {', '.join(DTYPES)}")
            tensor = StoredTensor(path, name, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + header_size + start)
            if end - start != tensor.num_bytes:
                raise InputError(f"{path}: damaged: {name} has {end - start} bytes for the shape {tensor.shape}")
            tensors[name] = tensor
            end_of_data = max(end_of_data, 8 + header_size + end)
    except (AttributeError, KeyError, TypeError):
        raise InputError(f"{path}: damaged header; download or write it again") from None
    if size != end_of_data:
        raise InputError(
            f"{path}: truncated or damaged: {size} bytes where its header announces {end_of_data};"
            " download or write it again"
        )
    return tensors


def check_tensors(shapes: dict[str, tuple[int, ...]], model: Llama, where: Path) -> None:
    """Compare the names and shapes found in a checkpoint with the parameters of its model.

    Raises:
        InputError: a tensor is missing, has another shape, or has no place in the model; `where` is named.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for names, fault in (
        ([name for name in expected if name not in shapes], "is missing; config.json asks for it"),
        ([name for name in shapes if name not in expected], "has no place in the model that config.json describes"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise InputError(f"{where}: the tensor {names[0]}{more} {fault}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise InputError(f"{where}: {name} has shape {shapes[name]}, config.json asks for {shape}")


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written, made piece by piece when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """To be stored as."""
    pieces: Callable[[], Iterable[Tensor]]
    """Tensors of any dtype and device whose elements, one piece after the other, are the tensor's."""


def write_tensors(directory: Path, tensors: dict[str, TensorSource], max_shard_size: int = 5_000_000_000) -> None:
    """Write model.safetensors, or shards with an index, holding no more than one piece in memory.

    For use inside `files.atomic_directory`.
    """
    sizes = {name: math.prod(source.shape) * source.dtype.itemsize for name, source in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_shard_size:
            shards.append([])
        shards[-1].append(name)

    if len(shards) == 1:
        _write_safetensors(directory / "model.safetensors", tensors)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(directory / file_name, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def write_config(directory: Path, config: LlamaConfig, dtype: torch.dtype) -> None:
    """Write config.json with the dtype under the names of transformers 4 (torch_dtype) and 5 (dtype)."""
    name = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", config.to_huggingface() | {"torch_dtype": name, "dtype": name})


def copy_tokenizer(source: Path | str, directory: Path) -> None:
    """Copy the tokenizer and generation files of one checkpoint directory into another.

    Raises:
        InputError: the source has no tokenizer.
    """
    found = [Path(source) / name for name in COMPANION_FILES if (Path(source) / name).is_file()]
    if not any(path.name in ("tokenizer.json", "tokenizer.model") for path in found):
        raise InputError(f"{source}: neither tokenizer.json nor tokenizer.model")
    for path in found:
        shutil.copyfile(path, directory / path.name)


def existing_directory(checkpoint_dir: Path | str) -> Path:
    """The directory as a Path; an InputError where there is none."""
    checkpoint_dir = Path(checkpoint_dir)
    if not checkpoint_dir.is_dir():
        raise InputError(f"{checkpoint_dir}: no such directory; scripts/download.py fetches a checkpoint from a hub")
    return checkpoint_dir


def _tensor_files(checkpoint_dir: Path) -> list[tuple[Path, list[str] | None]]:
    """Each safetensors file of a checkpoint with the names to take from it; None: all of them."""
    single, index = checkpoint_dir / "model.safetensors", checkpoint_dir / "model.safetensors.index.json"
    if single.exists():
        return [(single, None)]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not weight_map:
            raise InputError(f"{index}: no weight_map")
        files: dict[str, list[str]] = {}
        for name, file_name in weight_map.items():
            files.setdefault(file_name, []).append(name)
        return [(checkpoint_dir / file_name, names) for file_name, names in sorted(files.items())]
    if any(checkpoint_dir.glob("*.bin")) or any(checkpoint_dir.glob("*.pth")):
        raise InputError(
            f"{checkpoint_dir}: holds pickled weights (.bin, .pth) but no safetensors;"
            " convert it with scripts/convert_checkpoint.py"
        )
    raise InputError(f"{checkpoint_dir}: neither model.safetensors nor model.safetensors.index.json")


def _mapped_or_read(
    stored: StoredTensor, dtype: torch.dtype, device: torch.device, mappings: dict[Path, mmap.mmap]
) -> Tensor:
    """A tensor in `dtype` on `device`: a view of the mapped file where nothing is to be converted, else read."""
    if device.type != "cpu" or stored.dtype != dtype or stored.start % dtype.itemsize:
        return _read(stored, dtype, device)
    if stored.path not in mappings:
        with open(stored.path, "rb") as file:
            # Copy on write: training a loaded model in place must not reach the file.
            mappings[stored.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    count = math.prod(stored.shape)
    return torch.frombuffer(mappings[stored.path], dtype=dtype, count=count, offset=stored.start).view(stored.shape)


def _read(stored: StoredTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor read from its file piece by piece into memory of its own."""
    # Not through a mapping: the pages of a mapped file count as the process's memory until the mapping is gone.
    result = torch.empty(stored.shape, dtype=dtype, device=device)
    flat, position = result.view(-1), 0
    for piece in stored.pieces():
        flat[position : position + len(piece)] = piece
        position += len(piece)
    return result


def _set_quantized(
    model: Llama, name: str, stored: StoredTensor, dtype: torch.dtype, device: torch.device, mode: str
) -> None:
    """Put a quantized linear layer in the place of the one whose weight is called `name`."""
    from lit_llama.quantization import QuantizedLinear

    parent, _, child = name.removesuffix(".weight").rpartition(".")
    setattr(model.get_submodule(parent), child, QuantizedLinear.from_weight(_read(stored, dtype, device), mode))
    _return_freed_memory()


def _set_embedding(
    model: Llama, name: str, stored: StoredTensor, dtype: torch.dtype, device: torch.device, place: str
) -> None:
    """Put the embedding, or the head, in int8, or the embedding alone in the host's memory."""
    from lit_llama.quantization import HostEmbedding, QuantizedEmbedding, QuantizedLinear

    is_head, tied = name == "lm_head.weight", model.config.tie_word_embeddings
    if place == "cpu":
        if tied:
            raise InputError(
                "embeddings = 'cpu' frees nothing here: this model's head is the same weight, which is needed on the"
                " device; use 'int8'"
            )
        weight = _read(stored, dtype, device if is_head else torch.device("cpu"))
        if is_head:
            model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
        else:
            model.model.embed_tokens = HostEmbedding(weight)
        return
    if place != "int8":
        raise InputError(f"embeddings = {place!r} is not one of int8, cpu")
    table = QuantizedLinear.from_weight(_read(stored, dtype, device), "int8")
    if not is_head:
        model.model.embed_tokens = QuantizedEmbedding(table, dtype)
    if is_head or tied:
        model.lm_head = table
    _return_freed_memory()


def _return_freed_memory() -> None:
    # glibc keeps the dense copies it was given back, as holes between the packed weights that stay: without this an
    # int8 model takes 2.5 times its bytes.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _fingerprint(stored: dict[str, StoredTensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(stored):
        tensor = stored[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        with open(tensor.path, "rb") as file:
            file.seek(tensor.start)
            digest.update(file.read(min(4096, tensor.num_bytes)))
    return digest.hexdigest()


def _single(tensor: Tensor) -> Callable[[], list[Tensor]]:
    return lambda: [tensor.detach()]


def _write_safetensors(path: Path, tensors: dict[str, TensorSource]) -> None:
    names_of_dtypes = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, source in tensors.items():
        start, end = end, end + math.prod(source.shape) * source.dtype.itemsize
        dtype = names_of_dtypes[source.dtype]
        header[name] = {"dtype": dtype, "shape": list(source.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # Aligns the tensors to cache lines: whoever maps the file multiplies with them where they lie.
    encoded += b" " * (-(8 + len(encoded)) % 64)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, source in tensors.items():
            written = 0
            for piece in source.pieces():
                for part in piece.reshape(-1).split(PIECE_BYTES // 4):
                    part = part.to("cpu", source.dtype).contiguous()
                    file.write(part.view(torch.uint8).numpy())
                    written += len(part)
            if written != math.prod(source.shape):
                raise RuntimeError(f"{name}: {written} elements were made for shape {source.shape}")
        file.flush()
        os.fsync(file.fileno())
