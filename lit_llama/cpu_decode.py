"""Generation on a CPU, at the speed at which its memory gives the weights and its cores multiply.

PyTorch spends most of a step of generation between kernels, and its kernels for few rows read the weights at half of
what the memory can. `cpu_decode.cpp` does a whole step in one call, on the weights where they lie: nothing is copied or
packed, so that it is ready at once. On processors with tiles for bf16 (Intel's AMX) it reads a prompt in one call too,
each row with its adapter. Elsewhere, and where a window hides some tokens from others, a prompt is read layer by layer:
what lies between the matrix products and attention is in that file, and these are PyTorch's unless tiles can do them.
It is compiled the first time, which takes seconds, with the machine's own C++ compiler; without one, or with a layer
that it does not know, everything goes through the model as before.

Which tokens are asked for and how they are chosen is `generation.py`; keys and values lie in `kv_cache.KVCache`.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.adapters import AdapterBank, BankedLinear
from lit_llama.command_line import progress
from lit_llama.errors import RunError
from lit_llama.files import atomic_path
from lit_llama.functional import attention
from lit_llama.kv_cache import KVCache
from lit_llama.lora_linear import LoRALinear
from lit_llama.model import MLP, Llama, rotary_inverse_frequencies
from lit_llama.quantization import FourBitWeight, QuantizedLinear

_SOURCE = Path(__file__).with_suffix(".cpp")
_HEADERS = [_SOURCE.with_name(name) for name in ("cpu_activations.hpp", "cpu_tiles.hpp", "cpu_weights.hpp")]
# GCC holds some processors that have longer vectors to 256 bits.
_VECTORS = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", *_VECTORS, "-shared", "-fPIC",
    # Apple's compiler has no OpenMP: one thread there. Elsewhere the threads are PyTorch's own, whose library it is.
    "-fopenmp-simd" if sys.platform == "darwin" else "-fopenmp",
    # Sums may be taken in any order, nothing is infinite, and nobody asks for the exceptions of arithmetic.
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno", "-ffinite-math-only",
)  # fmt: skip
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_FOUR_BITS = 3


class _Matrix(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("kind", "out", "input")),
        *((name, c_void_p) for name in ("weight", "scales", "minima", "levels")),
        *((name, c_int64) for name in ("group", "bf16")),
    ]


class _LowRank(Structure):
    _fields_ = [("r", c_int64), ("A", c_void_p), ("B", c_void_p)]


class _Shape(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab")),
        ("window", c_int64),
        ("epsilon", c_float),
        ("bf16", c_int64),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("tokens", "length", "kind", "capacity")),
        *((name, c_void_p) for name in ("positions", "adapters", "cosines", "sines")),
        *((name, POINTER(c_void_p)) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, c_void_p) for name in ("x", "logits")),
    ]


class _Prompt(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "length", "capacity")),
        *((name, c_void_p) for name in ("columns", "adapters", "cosines", "sines")),
    ]


class _Memory(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("kind", "length")),
        ("paddings", c_void_p),
        *((name, POINTER(c_void_p)) for name in ("keys", "values", "key_scales", "value_scales")),
    ]


class CPUDecoder:
    """Reads prompts and computes the logits of one or a few more tokens a row; made by `cpu_decoder`.

    Residuals are fp32 whatever the weights are, and in a step everything is, so that the logits differ from the model's
    own by the rounding that those do. A token's logits do not depend, to the bit, on which rows go with it, nor on how
    many tokens of its row a step takes.
    """

    def __init__(self, model: Llama, layers: list[nn.Module], library: ctypes.CDLL) -> None:
        config = model.config
        self.library, self.model = library, model
        self.frequencies = rotary_inverse_frequencies(config)
        self.bank: AdapterBank | None = getattr(model, "adapter_bank", None)
        weights = list(map(_base_layer, layers))
        norms = [
            norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self._norms = [norm.weight.detach().float() for norm in (*norms, model.model.norm)]
        self._adapters = _adapters(model, layers[:-1], self.bank)
        shape = _Shape(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            weights[-1].out_features,
            config.sliding_window or 0,
            config.rms_norm_eps,
            model.model.norm.weight.dtype == torch.bfloat16,
        )
        four_bits = [layer.four_bits() if isinstance(layer, QuantizedLinear) else None for layer in weights]
        matrices = (_Matrix * len(weights))(*map(_matrix, weights, four_bits))
        self._weights, self._four_bits = weights, four_bits  # their memory is read for as long as this lives
        tiles = bool(shape.bf16 and library.decoder_tiles())
        pairs = enumerate(zip(layers[:-1], weights[:-1], strict=True))
        self._tiled = {layer: number for number, (layer, own) in pairs if tiles and layer is own and _suits_tiles(own)}
        """The layers whose products with prompts the processor's tiles take, and their numbers."""
        self._tiled_attention = tiles and config.head_dim % 32 == 0
        self._all_tiled = self._tiled_attention and all(map(_suits_tiles, weights[:-1]))
        """Whether a prompt can be read in one call, adapted layers too."""
        self.handle = c_void_p(
            library.decoder_new(ctypes.byref(shape), matrices, _pointers(self._norms), torch.get_num_threads())
        )
        for number, layer in enumerate(weights):
            if isinstance(layer, QuantizedLinear):
                layer.unpack = partial(self._unpack, number)
        low_ranks = [_low_rank(factors) for adapter in self._adapters for factors in adapter]
        library.decoder_set_adapters(self.handle, (_LowRank * len(low_ranks))(*low_ranks), len(self._adapters))

    def __del__(self) -> None:
        self.library.decoder_delete(self.handle)

    def read(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Read (rows, length) int64 ids into the cache; returns the last's normalised hidden states (rows, hidden)."""
        rows, length = input_ids.shape
        self._begin_pass(input_ids, cache)
        cache.prepare(length, in_order=True)
        tables = self._rotary_tables(cache.positions.expand(rows, -1))
        columns, capacity = cache.columns.expand(rows, -1).contiguous(), cache.capacity
        adapters = self._adapters_of(cache, rows)
        x = self.model.model.embed_tokens(input_ids).float()
        if self._all_tiled and cache.dtype == torch.bfloat16 and not cache.windowed(cache.length + length):
            prompt = _Prompt(rows, length, capacity, *map(_pointer, (columns, adapters, *tables)))
            normed = self._read_tiled(x, cache, prompt)
            cache.length += length
            return normed
        # Whether what is computed and seen lies in the cache as it is, and in order.
        in_place = not cache.key_scales and cache.first is None
        if not in_place:
            columns, capacity = torch.arange(length).repeat(rows, 1), length
        prompt = _Prompt(rows, length, capacity, *map(_pointer, (columns, adapters, *tables)))

        added, normed = None, torch.empty(x.shape, dtype=cache.dtype)
        for number, layer in enumerate(self.model.model.layers):
            self._add_and_normalise(x, added, 2 * number, normed)
            attention_layer, mlp = layer.self_attn, layer.mlp
            projections = (attention_layer.q_proj, attention_layer.k_proj, attention_layer.v_proj)
            query, key, value = (self._product(projection, normed) for projection in projections)
            mixed = self._attend(query, key, value, number, cache, prompt, in_place)
            if number == len(self.model.model.layers) - 1:
                # Nothing more is asked of the others. Two: of one the products would run in another kernel.
                x, mixed = x[:, -2:].contiguous(), mixed[:, -2:]
                normed = torch.empty(x.shape, dtype=cache.dtype)
                self._begin_pass(input_ids[:, -2:], cache)
            added = self._product(attention_layer.o_proj, mixed)
            self._add_and_normalise(x, added, 2 * number + 1, normed)
            added = self._product(mlp.down_proj, self._gate_times_up(mlp, normed))
        self._add_and_normalise(x, added, len(self._norms) - 1, normed)
        cache.length += length
        return normed[:, -1]

    def _read_tiled(self, x: Tensor, cache: KVCache, prompt: _Prompt) -> Tensor:
        """As `read`, from embeddings fp32 (rows, length, hidden) on, in one call: Python takes long between two.

        What it executes has left the processor's caches by the time a product is done.
        """
        normed = torch.empty(len(x), x.shape[-1], dtype=cache.dtype)
        paddings = torch.zeros(len(x), dtype=torch.int64) if cache.padding is None else cache.padding
        kind = _KINDS[cache.keys[0].dtype]
        memory = _Memory(kind, cache.length, _pointer(paddings), *_stored(cache))
        structures = map(ctypes.byref, (prompt, memory))
        self.library.decoder_read_prompt(self.handle, *structures, _pointer(x), _pointer(normed))
        return normed

    def _adapters_of(self, cache: KVCache, rows: int) -> Tensor:
        """Place of each row's adapter among those that the decoder has, (rows,) int64, -1 for the base."""
        if self.bank is not None:
            return torch.tensor(self.bank.rows_of(cache)[:rows])
        return torch.full((rows,), len(self._adapters) - 1)  # the only one, or none

    def _begin_pass(self, input_ids: Tensor, cache: KVCache) -> None:
        if self.bank is not None:
            self.bank.begin_pass(self.model.model, (input_ids,), {"cache": cache})

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, cache: KVCache, prompt: _Prompt, in_place: bool
    ) -> Tensor:
        """Attention of a prompt (rows, length, heads * head_dim each) over the cache, in which it is stored."""
        rows, kv_heads, _, head_dim = cache.keys[layer].shape
        length, heads = prompt.length, query.shape[-1] // head_dim
        queries = torch.empty(rows, heads, length, head_dim, dtype=query.dtype)
        keys, values = cache.keys[layer], cache.values[layer]
        if not in_place:
            keys, values = (torch.empty(rows, kv_heads, length, head_dim, dtype=query.dtype) for _ in range(2))
        pointers = map(_pointer, (query, key, value, queries, keys, values))
        self.library.decoder_rotate_and_store(self.handle, ctypes.byref(prompt), *pointers)
        if not in_place:
            keys, values = cache.append(layer, keys, values)
        if cache.length or cache.windowed(cache.length + length):  # more than a triangle
            keys, values = keys[:, :, : cache.attended], values[:, :, : cache.attended]
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=cache.mask, enable_gqa=True)
            return mixed.transpose(1, 2).flatten(2)
        mixed, paddings = torch.empty(rows, length, heads, head_dim, dtype=query.dtype), [0] * rows
        if cache.padding is not None:
            mixed.zero_()
            paddings = cache.padding.tolist()
        if self._tiled_attention:
            keys, values = keys.contiguous(), values.contiguous()
            for row, padding in enumerate(paddings):
                own = (queries[row, :, padding:], keys[row], values[row], mixed[row, padding:])
                sizes = (length - padding, queries.stride(1), keys.shape[2])
                self.library.decoder_attend_prompt(self.handle, *sizes, *map(_pointer, own))
            return mixed.flatten(2)
        groups = [(slice(rows), 0)]
        if cache.padding is not None:  # each row as it would be alone, to the bit
            groups = [(slice(row, row + 1), padding) for row, padding in enumerate(paddings)]
        for group, padding in groups:
            own = (tensor[group, :, : length - padding] for tensor in (keys, values))
            mixed[group, padding:] = F.scaled_dot_product_attention(
                queries[group, :, padding:], *own, is_causal=True, enable_gqa=True
            ).transpose(1, 2)
        return mixed.flatten(2)

    def _product(self, layer: nn.Module, x: Tensor) -> Tensor:
        return self._tiled_product(layer, None, x) if layer in self._tiled else layer(x)

    def _gate_times_up(self, mlp: MLP, x: Tensor) -> Tensor:
        if self._tiled.keys() >= {mlp.gate_proj, mlp.up_proj}:
            return self._tiled_product(mlp.gate_proj, mlp.up_proj, x)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        self.library.decoder_gate_times_up(self.handle, gate.numel(), _pointer(gate), _pointer(up))
        return gate

    def _tiled_product(self, layer: nn.Module, up: nn.Module | None, x: Tensor) -> Tensor:
        """The product of hidden states (rows, length, in) bf16; with `up`, silu of it times that of `up`."""
        x, product = x.contiguous(), torch.empty(*x.shape[:-1], layer.out_features, dtype=x.dtype)
        numbers = (self._tiled[layer], -1 if up is None else self._tiled[up])
        tokens = x.shape[0] * x.shape[1]
        self.library.decoder_multiply_prompt(self.handle, *numbers, tokens, _pointer(x), _pointer(product))
        return product

    def _add_and_normalise(self, x: Tensor, added: Tensor | None, norm: int, normed: Tensor) -> None:
        tensors = (x, added, normed)
        x_at, added_at, normed_at = (None if tensor is None else _pointer(tensor) for tensor in tensors)
        rows = x.shape[0] * x.shape[1]
        self.library.decoder_add_and_normalise(self.handle, rows, x_at, added_at, norm, normed_at)

    def _unpack(self, matrix: int, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of a quantized matrix, dense."""
        dense = torch.empty(rows.stop - rows.start, self._weights[matrix].in_features, dtype=dtype)
        to = (dtype == torch.bfloat16, _pointer(dense))
        self.library.decoder_unpack(self.handle, matrix, rows.start, rows.stop, *to)
        return dense

    def _rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, the first half of it negated, fp32 (*positions.shape, head_dim)."""
        angles = positions[..., None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits (rows, length, vocab) fp32 after each of some tokens (rows, length) int64, which the cache then holds.

        All weights are read once: for few tokens, a prompt is rather read by `read`.
        """
        rows, length = tokens.shape
        cache.reserve(length)
        positions = torch.arange(cache.length, cache.length + length).repeat(rows, 1)
        if cache.padding is not None:
            positions -= cache.padding[:, None]
        cos, sin = self._rotary_tables(positions)
        x = self.model.model.embed_tokens(tokens).float()
        logits = torch.empty(rows, length, self._weights[-1].out_features)
        adapters = self._adapters_of(cache, rows).repeat_interleave(length)
        inputs = map(_pointer, (positions, adapters, cos, sin))
        kind = _KINDS[cache.keys[0].dtype]
        step = _Step(
            rows * length, length, kind, cache.capacity, *inputs, *_stored(cache), _pointer(x), _pointer(logits)
        )
        self.library.decoder_step(self.handle, ctypes.byref(step))
        cache.length += length
        return logits


def cpu_decoder(model: Llama) -> CPUDecoder | None:
    """The decoder of a model, or None where it does not apply.

    It applies to fp32 and bf16 weights on a CPU, as they are or quantized, with or without a LoRA adapter or a bank of
    them that has no memory limit; not to DoRA, an adapted head, prompt tuning, trees of adapters, routed MLPs, and NF4
    of rows that do not begin with a block.
    """
    weight = model.model.norm.weight
    layers = [
        linear
        for layer in model.model.layers
        for linear in (
            *(getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
            *(getattr(layer.mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")),
        )
    ]
    plain = all(type(layer.mlp) is MLP and layer.self_attn.attend is attention for layer in model.model.layers)
    if weight.device.type != "cpu" or weight.dtype not in _KINDS or not plain:
        return None
    if getattr(getattr(model, "adapter_bank", None), "memory_limit", None) is not None:
        return None
    if not all(map(_supported, layers)) or not _supported(model.lm_head) or isinstance(model.lm_head, LoRALinear):
        return None
    if len({getattr(layer, "mode", None) for layer in map(_base_layer, layers)}) > 1:
        return None
    library = _library()
    return None if library is None else CPUDecoder(model, [*layers, model.lm_head], library)


def _supported(layer: nn.Module | None) -> bool:
    if isinstance(layer, LoRALinear) and layer.lora_magnitude_vector is not None:
        return False
    if isinstance(layer, LoRALinear | BankedLinear):
        return _supported(_base_layer(layer))
    if isinstance(layer, QuantizedLinear):
        return layer.mode == "int8" or layer.has_four_bits
    return type(layer) is nn.Linear and layer.weight.dtype in _KINDS and layer.weight.is_contiguous()


def _suits_tiles(layer: nn.Module) -> bool:
    whole = layer.in_features % 32 == 0 and layer.out_features % 32 == 0
    return whole and (isinstance(layer, QuantizedLinear) or layer.weight.dtype == torch.bfloat16)


def _matrix(layer: nn.Module, four_bits: FourBitWeight | None) -> _Matrix:
    size = (layer.out_features, layer.in_features)
    if four_bits is not None:
        codes, levels, scales, minima, group = four_bits
        tensors = (None if tensor is None else _pointer(tensor) for tensor in (codes, scales, minima, levels))
        return _Matrix(_FOUR_BITS, *size, *tensors, group, scales.dtype == torch.bfloat16)
    if isinstance(layer, QuantizedLinear):
        return _Matrix(_KINDS[torch.int8], *size, _pointer(layer.codes), _pointer(layer.scale))
    return _Matrix(_KINDS[layer.weight.dtype], *size, _pointer(layer.weight))


def _base_layer(layer: nn.Module) -> nn.Module:
    """The layer that a LoRA layer or one of a bank wraps."""
    return layer.linear if isinstance(layer, LoRALinear) else getattr(layer, "base_layer", layer)


def _adapters(
    model: Llama, layers: list[nn.Module], bank: AdapterBank | None
) -> list[list[tuple[Tensor, Tensor] | None]]:
    """Of each adapter, for every layer: A (r, in) and B (out, r) with the scaling in it, fp32; None: not adapted."""
    if bank is not None:
        names = {module: name for name, module in model.named_modules()}
        factors = map(bank.low_rank, bank.names)
        return [[adapter.get(names[layer]) for layer in layers] for adapter in factors]
    if not any(isinstance(layer, LoRALinear) for layer in layers):
        return []
    return [[_low_rank_factors(layer) for layer in layers]]


def _low_rank_factors(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    if not isinstance(layer, LoRALinear):
        return None
    A, B = layer.factors()
    return A.detach().float().contiguous(), (layer.scaling * B.detach().float()).contiguous()


def _low_rank(factors: tuple[Tensor, Tensor] | None) -> _LowRank:
    if factors is None:
        return _LowRank(0, None, None)
    A, B = factors
    return _LowRank(len(A), A.data_ptr(), B.data_ptr())


def _pointer(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _pointers(tensors: list[Tensor]) -> ctypes.Array:
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _stored(cache: KVCache) -> tuple[ctypes.Array, ...]:
    """Where a cache has the keys, values and their scales of each layer."""
    return tuple(map(_pointers, (cache.keys, cache.values, cache.key_scales, cache.value_scales)))


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled file; told once where there is no compiler or it fails."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        progress("no C++ compiler found: generating at a fraction of the speed (install g++ or set CXX)")
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    files = (path.read_bytes() for path in (_SOURCE, *_HEADERS))
    key = hashlib.sha256(b"\0".join((*files, version, " ".join(_FLAGS).encode(), _processor())))
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_llama"
        path = directory / f"cpu_decode-{key.hexdigest()[:16]}.so"
        if not path.is_file():
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except RunError as error:
        progress(f"{error}: generating at a fraction of the speed")
        return None
    except (OSError, RuntimeError) as error:  # no home, a folder that nothing can be written to or run from
        progress(
            f"{error}: generating at a fraction of the speed (set XDG_CACHE_HOME to a folder for what is compiled)"
        )
        return None
    library.decoder_new.restype = c_void_p
    library.decoder_new.argtypes = [POINTER(_Shape), POINTER(_Matrix), POINTER(c_void_p), c_int64]
    library.decoder_set_adapters.argtypes = [c_void_p, POINTER(_LowRank), c_int64]
    library.decoder_step.argtypes = [c_void_p, POINTER(_Step)]
    library.decoder_add_and_normalise.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p]
    library.decoder_rotate_and_store.argtypes = [c_void_p, POINTER(_Prompt), *[c_void_p] * 6]
    library.decoder_unpack.argtypes = [c_void_p, *[c_int64] * 4, c_void_p]
    library.decoder_multiply_prompt.argtypes = [c_void_p, *[c_int64] * 3, c_void_p, c_void_p]
    library.decoder_read_prompt.argtypes = [c_void_p, POINTER(_Prompt), POINTER(_Memory), c_void_p, c_void_p]
    library.decoder_attend_prompt.argtypes = [c_void_p, *[c_int64] * 3, *[c_void_p] * 4]
    library.decoder_gate_times_up.argtypes = [c_void_p, c_int64, c_void_p, c_void_p]
    library.decoder_delete.argtypes = [c_void_p]
    return library


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        done = subprocess.run([compiler, *_FLAGS, _SOURCE, "-o", temporary], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise RunError(f"{compiler} cannot compile {_SOURCE.name} ({reason})")


def _processor() -> bytes:
    """What -march=native depends on: a home directory may be shared by different machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor().encode()
    return next((line for line in cpuinfo.read_bytes().splitlines() if line.startswith((b"flags", b"Features"))), b"")
