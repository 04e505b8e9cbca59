"""A routed MLP against the dense one, at the shapes of a 7B model: what reading only the selected experts saves.

python -m benchmarks.experts.mlp_speed --out benchmarks/experts/mlp_speed_cpu_2_cores.json

The paths take turns, and each round's ratio to the dense MLP's time of that round counts; the median over rounds is
given. One MLP with random weights, whose experts are used about equally. "packed" is as `generate/*` lays out bf16
weights on a CPU (`packed_linear.py`): compare the packed with each other.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.command_line import progress, run
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.files import refuse_overwrite, write_json
from lit_llama.hardware import pick_device, pick_dtype, run_environment
from lit_llama.mlp_partition import MLPRoutingConfig, PartitionedMLP
from lit_llama.model import MLP
from lit_llama.packed_linear import PackedLinear

LEAST_SECONDS = 0.05
"""What is shorter is repeated within a round."""


def main(
    *,
    hidden: int = 4096,
    intermediate: int = 11008,
    n_experts: int = 32,
    top_k: list[int] = [16, 8, 4],  # noqa: B006  never changed
    tokens: list[int] = [512, 1],  # noqa: B006
    dtypes: list[str] = ["bf16", "fp32"],  # noqa: B006
    rounds: int = 7,
    threads: int = 2,
    device: str = "auto",
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Time the dense MLP and each path of the routed one, forward only.

    Args:
        hidden: Width of the model.
        intermediate: Width of the MLP.
        n_experts: Experts that it is partitioned into.
        top_k: Experts a token, one after the other.
        tokens: Tokens at once; of 1 the path is decode, of more grouped.
        dtypes: bf16, fp16, fp32.
        rounds: How often the paths take turns, after one round that is not timed.
        threads: CPU threads.
        device: cpu, cuda, mps, or auto for the best there is.
        out: Write the results to this file too.
        overwrite: Replace the file.
    """
    if out is not None:
        refuse_overwrite(out, overwrite)
    if n_experts < 1 or intermediate % n_experts:
        raise InputError(f"--n_experts {n_experts} does not divide --intermediate {intermediate}")
    if min(rounds, threads, *tokens, *top_k) < 1 or max(top_k) > n_experts:
        raise InputError("--rounds, --threads, --tokens and --top_k must be at least 1, --top_k at most --n_experts")
    torch.set_num_threads(threads)
    place = pick_device(device)
    results = []
    for name in dtypes:
        for count in tokens:
            for k in top_k:
                results.append(measure(hidden, intermediate, n_experts, k, count, name, rounds, place))
                progress(json.dumps(results[-1]))
    setting = {"hidden": hidden, "intermediate": intermediate, "n_experts": n_experts, "rounds": rounds}
    result = {"setting": setting | {"threads": threads, "device": place.type}, "results": results, **run_environment()}
    if out is not None:
        write_json(out, result)
    print(json.dumps(result, indent=2))


@torch.inference_mode()
def measure(
    hidden: int, intermediate: int, n_experts: int, k: int, tokens: int, dtype: str, rounds: int, device: torch.device
) -> dict:
    """Median milliseconds of each path, and its median speed relative to the dense MLP's."""
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1, num_attention_heads=1, vocab_size=1
        )
        dense = MLP(config).to(pick_dtype(dtype, device)).eval().requires_grad_(False)
        x = torch.randn(1, tokens, hidden, dtype=dense.gate_proj.weight.dtype)
    routed = PartitionedMLP(dense, n_experts, MLPRoutingConfig(top_k=k))
    saving = "decode" if tokens == 1 else "grouped"
    paths: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": dense.feed_forward,
        "masked": routed.masked,
        saving: lambda x: getattr(routed, saving)(x[0])[None],
    }
    if tokens == 1 and device.type == "cpu" and dense.gate_proj.weight.dtype == torch.bfloat16:
        packed = MLP(config)
        for name, projection in list(dense.named_children()):
            setattr(packed, name, PackedLinear(projection.weight))
        paths["dense, packed"] = packed.feed_forward
        by_expert = PartitionedMLP(dense, n_experts, MLPRoutingConfig(top_k=k))
        by_expert.packed = [[PackedLinear(w) for w in routed.blocks(i, i + 1)] for i in range(n_experts)]
        paths["decode, packed"] = lambda x: by_expert.decode(x[0])[None]
    difference = float((paths[saving](x) - routed.masked(x)).norm() / routed.masked(x).norm())
    times: dict[str, list[float]] = {path: [] for path in paths}
    repetitions = {path: max(1, round(LEAST_SECONDS / timed(call, x, 1))) for path, call in paths.items()}
    for _ in range(rounds):
        for path, call in paths.items():
            times[path].append(timed(call, x, repetitions[path]))
    return {
        "dtype": dtype,
        "tokens": tokens,
        "top_k": k,
        "difference_to_masked": difference,
        "milliseconds": {path: 1000 * statistics.median(seconds) for path, seconds in times.items()},
        "speed": {
            path: statistics.median(d / s for d, s in zip(times["dense"], seconds, strict=True))
            for path, seconds in times.items()
        },
    }


def timed(call: Callable[[Tensor], Tensor], x: Tensor, repetitions: int) -> float:
    """Seconds of one call."""
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repetitions):
        call(x)
    synchronize()
    return (time.perf_counter() - start) / repetitions


if __name__ == "__main__":
    run(main)
