"""Tokens a second and peak memory of a LoRA training step, beside transformers + PEFT and litgpt on the same shapes.

    python scripts/benchmark_training.py --checkpoint_dir checkpoints/smollm2-135m-instruct
    python scripts/benchmark_training.py --checkpoint_dir checkpoints/smollm2-135m-instruct --contestants all_switches
    python scripts/benchmark_training.py --model llama-3-8b --batch_size 1 --sequence_length 4096
    python scripts/benchmark_training.py --model llama-3.1-8b --caps_gb [8,12,16,24]

Each contestant runs in a process of its own, so that its peak memory is its own; they take turns, several rounds
each, and the median step of all rounds counts. Compare the ratios: they hold where absolute times drift with the
machine's other work. How a contestant is built is in `benchmark_contestants.py`, beside this script.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark_contestants import CONTESTANTS, SWITCHES, Shape, build_step, installed_peers

from lit_llama.command_line import progress, run
from lit_llama.errors import InputError, RunError
from lit_llama.files import write_json
from lit_llama.hardware import peak_flops, peak_memory_gb, pick_device, run_environment


def main(
    *,
    checkpoint_dir: Path | None = None,
    model: str | None = None,
    out: Path | None = None,
    contestants: list[str] | str = "peers",
    r: int = 16,
    batch_size: int = 4,
    sequence_length: int = 512,
    document_length: int | None = None,
    steps: int = 6,
    rounds: int = 3,
    threads: int = 2,
    device: str = "auto",
    caps_gb: list[float] | None = None,
    contestant: str | None = None,
) -> None:
    """Measure one training step: forward, backward and AdamW on random tokens, bf16 base, LoRA on all linear layers.

    Args:
        checkpoint_dir: base model.
        model: or the name of an architecture, with random weights.
        out: where to write the results as JSON; they also go to stdout.
        contestants: peers (this project and the peers that are installed), all_switches (this project with each of its
            switches), or a list of names.
        r: LoRA rank (alpha = 2 r).
        batch_size: sequences a step.
        sequence_length: tokens a sequence.
        document_length: mean length of documents that are packed into the sequences here, and padded to each other in
            groups by peers, which have no document masks. None: a sequence is one document.
        steps: timed steps a round, after two that are not.
        rounds: how often the contestants take turns.
        threads: CPU threads.
        device: cpu, cuda or auto.
        caps_gb: instead, the longest sequence that trains under each of these limits of GPU memory (CUDA only).
        contestant: measure this one only, in this process, and print its round.
    """
    if (checkpoint_dir is None) == (model is None):
        raise InputError("give --checkpoint_dir or --model, one of them")
    place = pick_device(device)
    shape = Shape(checkpoint_dir, model, place, r, batch_size, sequence_length, document_length)
    torch.set_num_threads(threads)
    if contestant is not None:
        if contestant not in CONTESTANTS:
            raise InputError(f"contestant {contestant!r} is not one of {', '.join(CONTESTANTS)}")
        json.dump(measure(build_step(contestant, shape), place, steps), sys.stdout)
        return
    if caps_gb is not None:
        print(json.dumps(report(out, shape, threads, longest_under_caps(shape, caps_gb)), indent=2))
        return
    names = {"peers": ["lit-llama", *installed_peers()], "all_switches": list(SWITCHES)}.get(
        str(contestants), contestants
    )
    options = {
        "checkpoint_dir": checkpoint_dir, "model": model, "r": r, "batch_size": batch_size, "steps": steps,
        "sequence_length": sequence_length, "document_length": document_length, "threads": threads, "device": device,
    }  # fmt: skip
    given = [f"--{option}={value}" for option, value in options.items() if value is not None]
    results: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            process = subprocess.run(
                [sys.executable, __file__, *given, f"--contestant={name}"], capture_output=True, text=True
            )
            if process.returncode:
                raise RunError(f"{name} failed: {(process.stderr.strip() or 'no message').splitlines()[-1]}")
            results[name].append(json.loads(process.stdout))
            seconds = statistics.median(results[name][-1]["seconds"])
            rate = results[name][-1]["tokens"] / seconds
            progress(f"round {number + 1}/{rounds}  {name}: {rate:,.0f} tokens/s")
    summary = {name: summarized(measured) for name, measured in results.items()}
    first = summary[names[0]]
    for name in names[1:]:
        other = summary[name]
        other["speed_of_first_against_it"] = first["tokens_per_second"] / other["tokens_per_second"]
        other["memory_of_first_against_it"] = first["peak_memory_gb"] / other["peak_memory_gb"]
    print(json.dumps(report(out, shape, threads, summary), indent=2))


def report(out: Path | None, shape: Shape, threads: int, results: dict) -> dict:
    """The results with everything one must know to read them; also written to `out`."""
    matrix_flops = peak_flops(shape.device, torch.bfloat16, measured=True)
    for result in results.values():
        if isinstance(result, dict):
            result["share_of_matrix_rate"] = result["tokens_per_second"] * shape.flops_per_token() / matrix_flops
    content = {
        "setting": {**shape.description(), "threads": threads},
        "results": results,
        "matrix_tflops": matrix_flops / 1e12,
        **run_environment(peers=("transformers", "peft", "litgpt")),
    }
    if out is not None:
        write_json(out, content)
    return content


def summarized(measured: list[dict]) -> dict:
    """One contestant's rounds and their medians."""
    seconds = statistics.median(second for one in measured for second in one["seconds"])
    return {
        "tokens_per_second": measured[0]["tokens"] / seconds,
        "median_step_seconds": seconds,
        "peak_memory_gb": max(one["peak_memory_gb"] for one in measured),
        "rounds": measured,
    }


def measure(built: tuple[Callable[[], None], int], device: torch.device, steps: int) -> dict:
    """Seconds of each timed step, target tokens a step, and the peak memory of the process (CPU) or the device."""
    step, tokens = built
    seconds = []
    for number in range(steps + 2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "tokens": tokens, "peak_memory_gb": peak_memory_gb(device)}


def longest_under_caps(shape: Shape, caps_gb: list[float]) -> dict[str, int]:
    """Most tokens of one sequence that QLoRA trains on under each cap, found by trying, to within 256 tokens.

    All switches that save memory are on: NF4 with double quantization, int8 embedding and head, checkpointing of all
    layers with offload, a tiled MLP, the 8-bit optimizer.
    """
    if shape.device.type != "cuda":
        raise InputError("--caps_gb needs a CUDA device: it limits the memory of the GPU")
    total = torch.cuda.get_device_properties(shape.device).total_memory
    longest = {}
    for cap in caps_gb:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 1e9 / total), shape.device)
        low, high = 0, 1024
        while trains(shape._replace(batch_size=1, sequence_length=high)):
            low, high = high, 2 * high
        while high - low > 256:
            middle = (low + high) // 2
            fits = trains(shape._replace(batch_size=1, sequence_length=middle))
            low, high = (middle, high) if fits else (low, middle)
        longest[f"{cap:g} GB"] = low
        progress(f"{cap:g} GB: {low:,} tokens")
    return longest


def trains(shape: Shape) -> bool:
    """Whether two steps fit into the memory there is."""
    try:
        step, _ = build_step("lit-llama, least memory", shape)
        step()
        step()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        step = None
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
