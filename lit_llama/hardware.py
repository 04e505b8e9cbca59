"""What the machine is, what it could do and what it has used: for progress lines, reports and benchmarks."""

import ctypes
import importlib.metadata
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lit_llama.errors import InputError

# Dense bf16 tensor-core peak of cards people train on, in TFLOP/s, as their data sheets state it (without sparsity).
_PEAK_TFLOPS = {
    "RTX 3060": 51, "RTX 3090": 71, "RTX 4060": 60, "RTX 4070": 117, "RTX 4080": 195, "RTX 4090": 165, "RTX 5090": 210,
    "A10G": 70, "A100": 312, "A6000": 155, "L4": 121, "L40S": 362, "H100": 989, "H200": 989, "B200": 2250,
}  # fmt: skip


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of that name; "auto" is bf16 where the device has instructions for it, else fp32."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        supported = False
    return torch.bfloat16 if supported else torch.float32


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far, in 10^9 bytes: tensors on a CUDA device, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")  # Linux's getrusage also counts the process that started this one
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_memory_gb(device: torch.device) -> float:
    """Memory that can still be had on a device, in 10^9 bytes; all of the machine's where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached) / 1e9
    status = Path("/proc/meminfo")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024 / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed instead of giving it back to the system at once; no effect elsewhere.

    A training step on a CPU frees and asks for gigabytes, and each page that comes back from the system is zeroed and
    mapped first, which takes longer than many operations that then write it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**25)  # the largest that glibc takes


@cache
def peak_flops(device: torch.device, dtype: torch.dtype, measured: bool = False) -> float:
    """Floating-point operations a second that a step could reach at best: the basis of MFU.

    The data sheet's figure for a known CUDA card; otherwise, or with `measured`, what a large matrix product reaches
    here (a second or less, once a process).
    """
    if device.type == "cuda" and dtype != torch.float32 and not measured:
        name = torch.cuda.get_device_name(device)
        for card in sorted(_PEAK_TFLOPS, key=len, reverse=True):
            if card in name:
                return _PEAK_TFLOPS[card] * 1e12
    size = 2048 if device.type == "cpu" else 4096
    a = b = torch.ones(size, size, device=device, dtype=dtype)  # not random: the caller's random state is its own
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 0.5:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # .item() waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def run_environment(peers: Sequence[str] = ()) -> dict[str, dict]:
    """What a run runs on: {"source": git revision, dirty, command}, {"versions": ...}, {"hardware": ...}; plain values.

    The git entries are None where this package is not under version control.

    Args:
        peers: further packages whose versions matter, because a benchmark compares with them.
    """
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            process = subprocess.run(["git", "-C", here.parent, *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return process.stdout.strip() if process.returncode == 0 else None

    # An installed copy may lie inside the repository of another project, whose revision says nothing about this code.
    tracked = git("ls-files", "--error-unmatch", here.name) is not None
    changes = git("status", "--porcelain", "--untracked-files=no") if tracked else None
    versions = {"python": platform.python_version()}
    for package in (
        "torch",
        "lightning",
        "numpy",
        "safetensors",
        "tokenizers",
        "sentencepiece",
        "bitsandbytes",
        "neptune",
        *peers,
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }
    return {
        "source": {
            "git_revision": git("rev-parse", "HEAD") if tracked else None,
            "git_dirty": None if changes is None else bool(changes),
            "command": shlex.join(sys.orig_argv),
        },
        "versions": versions,
        "hardware": hardware,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
