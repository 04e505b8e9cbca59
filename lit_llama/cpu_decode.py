"""One token of each row of a batch on a CPU, at the speed at which its memory gives the weights.

PyTorch spends most of such a step between kernels, and its kernels for few rows read the weights at half of what the
memory can. `cpu_decode.cpp` does a whole step in one call, on the weights where they lie: nothing is copied or packed,
so that it is ready at once. It is compiled the first time, which takes seconds, with the machine's own C++ compiler;
without one, or with a layer that it does not know, everything goes through the model as before.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_llama.command_line import progress
from lit_llama.errors import RunError
from lit_llama.files import atomic_path
from lit_llama.functional import attention
from lit_llama.lora_linear import LoRALinear
from lit_llama.model import MLP, KVCache, Llama, rotary_inverse_frequencies
from lit_llama.quantization import QuantizedLinear

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC", "-pthread",
    # Sums may be taken in any order, and nobody asks for the exceptions of arithmetic.
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno",
)  # fmt: skip
_KINDS = {torch.float32: 0, torch.bfloat16: 1, "int8": 2}


class _Matrix(Structure):
    _fields_ = [("kind", c_int64), ("out", c_int64), ("input", c_int64), ("weight", c_void_p), ("scales", c_void_p)]


class _LowRank(Structure):
    _fields_ = [("r", c_int64), ("A", c_void_p), ("B", c_void_p)]


class _Shape(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab")),
        ("window", c_int64),
        ("epsilon", c_float),
        ("bf16_cache", c_int64),
    ]


class CPUDecoder:
    """Computes the logits of one more token a row; made by `cpu_decoder`.

    Activations are fp32 whatever the weights are, so that the logits differ from the model's own by the rounding that
    those do. A row's logits do not depend, to the bit, on which rows go with it.
    """

    def __init__(self, model: Llama, layers: list[nn.Module], library: ctypes.CDLL) -> None:
        config = model.config
        self.library, self.model = library, model
        self.frequencies = rotary_inverse_frequencies(config)
        weights = [getattr(layer, "linear", layer) for layer in layers]
        norms = [
            norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self._norms = [norm.weight.detach().float() for norm in (*norms, model.model.norm)]
        self._adapters = [_low_rank_factors(layer) for layer in layers[:-1]]
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
        matrices = (_Matrix * len(weights))(*map(_matrix, weights))
        self._weights = weights  # their memory is read for as long as this lives
        self.handle = c_void_p(
            library.decoder_new(ctypes.byref(shape), matrices, _pointers(self._norms), torch.get_num_threads())
        )
        self.adapter = -1
        if any(factors is not None for factors in self._adapters):
            low_ranks = (_LowRank * len(self._adapters))(*map(_low_rank, self._adapters))
            library.decoder_set_adapters(self.handle, low_ranks, 1)
            self.adapter = 0

    def __del__(self) -> None:
        self.library.decoder_delete(self.handle)

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits (rows, vocab) fp32 after one more token (rows,) int64 each, which the cache then holds."""
        cache.reserve(1)
        positions = torch.full((len(tokens),), cache.length)
        if cache.padding is not None:
            positions -= cache.padding
        angles = positions[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (rows, head_dim)
        x = self.model.model.embed_tokens(tokens).float()
        logits = torch.empty(len(tokens), self._weights[-1].out_features)
        adapters = torch.full((len(tokens),), self.adapter)
        self.library.decoder_step(
            self.handle,
            len(tokens),
            cache.keys[0].shape[2],
            *(c_void_p(tensor.data_ptr()) for tensor in (positions, adapters, cos, sin)),
            _pointers(cache.keys),
            _pointers(cache.values),
            c_void_p(x.data_ptr()),
            c_void_p(logits.data_ptr()),
        )
        cache.length += 1
        return logits


def cpu_decoder(model: Llama) -> CPUDecoder | None:
    """The decoder of a model, or None where it does not apply.

    It applies to fp32 and bf16 weights on a CPU, as they are or in int8, with or without a LoRA adapter; not to
    NF4, DoRA, an adapted head, prompt tuning, trees of adapters, routed MLPs.
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
    if not all(map(_supported, layers)) or not _supported(model.lm_head) or isinstance(model.lm_head, LoRALinear):
        return None
    library = _library()
    return None if library is None else CPUDecoder(model, [*layers, model.lm_head], library)


def _supported(layer: nn.Module | None) -> bool:
    if isinstance(layer, LoRALinear):
        return layer.lora_magnitude_vector is None and _supported(layer.linear)
    if isinstance(layer, QuantizedLinear):
        return layer.mode in _KINDS
    return type(layer) is nn.Linear and layer.weight.dtype in _KINDS and layer.weight.is_contiguous()


def _matrix(layer: nn.Module) -> _Matrix:
    if isinstance(layer, QuantizedLinear):
        size = (layer.out_features, layer.in_features)
        return _Matrix(_KINDS[layer.mode], *size, layer.codes.data_ptr(), layer.scale.data_ptr())
    return _Matrix(_KINDS[layer.weight.dtype], *layer.weight.shape, layer.weight.data_ptr(), None)


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


def _pointers(tensors: list[Tensor]) -> ctypes.Array:
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled file; told once where there is no compiler or it fails."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        progress("no C++ compiler found: generating at a fraction of the speed (install g++ or set CXX)")
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    key = hashlib.sha256(b"\0".join((_SOURCE.read_bytes(), version, " ".join(_FLAGS).encode(), _processor())))
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_llama"
    path = directory / f"cpu_decode-{key.hexdigest()[:16]}.so"
    if not path.is_file():
        try:
            _compile(compiler, path)
        except RunError as error:
            progress(f"{error}: generating at a fraction of the speed")
            return None
    library = ctypes.CDLL(str(path))
    library.decoder_new.restype = c_void_p
    library.decoder_new.argtypes = [POINTER(_Shape), POINTER(_Matrix), POINTER(c_void_p), c_int64]
    library.decoder_set_adapters.argtypes = [c_void_p, POINTER(_LowRank), c_int64]
    library.decoder_step.argtypes = [
        c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_void_p), POINTER(c_void_p),
        c_void_p, c_void_p,
    ]  # fmt: skip
    library.decoder_delete.argtypes = [c_void_p]
    return library


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        done = subprocess.run([compiler, *_FLAGS, _SOURCE, "-o", temporary], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise RunError(f"{compiler} cannot compile {_SOURCE.name} ({reason})")


def _processor() -> bytes:
    """What -march=native depends on: a home directory may be shared by different machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor().encode()
    return next((line for line in cpuinfo.read_bytes().splitlines() if line.startswith((b"flags", b"Features"))), b"")
