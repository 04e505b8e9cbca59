"""Tokens a second of greedy generation and of prefill, in bf16 and with 8-bit weights, beside transformers.

    python scripts/benchmark_generation.py --checkpoint_dir checkpoints/smollm2-135m-instruct --out
    benchmarks/generation_cpu.json

Each contestant runs in a process of its own; they take turns, several rounds each, and the median counts. Compare the
ratios: they hold where absolute times drift with the machine's other work.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lit_llama.answering import bytes_per_step
from lit_llama.checkpoint import existing_directory, load_model
from lit_llama.command_line import progress, run
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError, RunError
from lit_llama.files import refuse_overwrite, write_json
from lit_llama.generation import generate, prepare_to_generate
from lit_llama.hardware import peak_memory_gb, pick_device, pick_dtype, run_environment

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, new tokens) -> exactly so many new tokens of each prompt, greedily."""

OWN = {"lit-llama": None, "lit-llama int8": "int8"}
"""How the weights are stored."""
PEER = "transformers"
REPEATS = 3
"""Of everything that a contestant does in its turn, after once that is not timed."""


def main(
    *,
    checkpoint_dir: Path,
    out: Path | None = None,
    batch_size: int = 1,
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    prefill_tokens: int = 1024,
    rounds: int = 3,
    threads: int = 2,
    dtype: str = "bf16",
    device: str = "auto",
    peer: bool = True,
    overwrite: bool = False,
    contestant: str | None = None,
) -> None:
    """Measure greedy generation from random prompts, and the time to the first token after a long one.

    Args:
        checkpoint_dir: Base model.
        out: Where to write the results as JSON; they also go to stdout.
        batch_size: Prompts at a time.
        prompt_tokens: Length of the prompts that are continued.
        new_tokens: Tokens to generate after each.
        prefill_tokens: Length of the prompts whose first new token is waited for.
        rounds: How often the contestants take turns.
        threads: CPU threads.
        dtype: bf16, fp16 or fp32.
        device: cpu, cuda, mps, or auto for the best there is.
        peer: Measure transformers too.
        overwrite: Replace the file.
        contestant: Measure this one only, in this process, and print its turn.
    """
    if out is not None:
        refuse_overwrite(out, overwrite)
    numbers = {
        "batch_size": batch_size, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
        "prefill_tokens": prefill_tokens, "rounds": rounds, "threads": threads,
    }  # fmt: skip
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    vocab_size = LlamaConfig.from_json(existing_directory(checkpoint_dir) / "config.json").vocab_size
    names = [*OWN, PEER] if peer else list(OWN)
    if contestant is not None:
        if contestant not in names:
            raise InputError(f"contestant {contestant!r} is not one of {', '.join(names)}")
        torch.set_num_threads(threads)
        place = pick_device(device)
        precision = pick_dtype(dtype, place)
        if contestant == PEER:
            weight_bytes, generate_with = 0, transformers_generate(checkpoint_dir, precision, place)
        else:
            stored = OWN[contestant]
            model = load_model(checkpoint_dir, precision, place, quantize=stored, embeddings=stored)
            weight_bytes, generate_with = bytes_per_step(model), partial(generate, model)
            prepare_to_generate(model)
        short, long = (random_prompts(vocab_size, batch_size, length) for length in (prompt_tokens, prefill_tokens))
        generating = [timed(generate_with, short, new_tokens) for _ in range(1 + REPEATS)]
        prefilling = [timed(generate_with, long, 1) for _ in range(1 + REPEATS)]
        measured = {
            "generate": [seconds for _, seconds in generating[1:]],
            "prefill": [seconds for _, seconds in prefilling[1:]],
            "tokens": generating[0][0],
            "weight_bytes": weight_bytes,
            "peak_memory_gb": peak_memory_gb(place),
        }
        json.dump(measured, sys.stdout)
        return
    if peer and importlib.util.find_spec("transformers") is None:
        raise InputError("the comparison needs transformers: pip install transformers, or pass --peer false")

    options = {"checkpoint_dir": checkpoint_dir, "dtype": dtype, "device": device, "peer": peer, **numbers}
    given = [f"--{option}={value}" for option, value in options.items()]
    turns: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            command = [sys.executable, __file__, *given, f"--contestant={name}"]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode:
                raise RunError(f"{name} failed: {(process.stderr.strip() or 'no message').splitlines()[-1]}")
            turns[name].append(turn := json.loads(process.stdout))
            generating, prefilling = (statistics.median(turn[what]) for what in ("generate", "prefill"))
            rate = batch_size * new_tokens / generating
            progress(f"round {number + 1}/{rounds}  {name}: {rate:.1f} tokens/s, first token after {prefilling:.2f} s")

    results = {}
    for name, measured in turns.items():
        seconds = {what: [second for turn in measured for second in turn[what]] for what in ("generate", "prefill")}
        generating, prefilling = (statistics.median(seconds[what]) for what in ("generate", "prefill"))
        weight_bytes = measured[0]["weight_bytes"] or turns["lit-llama"][0]["weight_bytes"]
        results[name] = {
            "generate_tokens_per_second": batch_size * new_tokens / generating,
            "weights_gb_per_second": weight_bytes * new_tokens / generating / 1e9,
            "prefill_tokens_per_second": batch_size * prefill_tokens / prefilling,
            "peak_memory_gb": max(turn["peak_memory_gb"] for turn in measured),
            "seconds": seconds,
        }
    report = {
        "setting": {"checkpoint": checkpoint_dir.name, "dtype": dtype, "device": str(pick_device(device)), **numbers},
        "results": results,
    }
    if peer:
        for what in ("generate", "prefill"):
            key = f"{what}_tokens_per_second"
            report[f"{what}_speed_ratio"] = {name: results[name][key] / results[PEER][key] for name in OWN}
        report["leading_tokens_alike"] = [
            leading_alike(ours, theirs)
            for ours, theirs in zip(turns["lit-llama"][0]["tokens"], turns[PEER][0]["tokens"], strict=True)
        ]
    report |= run_environment(peers=(PEER,) if peer else ())
    if out is not None:
        write_json(out, report)
    print(json.dumps(report, indent=2))


def timed(generate_with: Generate, prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
    """The new tokens, and the seconds until they were known here; that waits for the device."""
    start = time.perf_counter()
    rows = generate_with(prompts, count)
    return rows, time.perf_counter() - start


def random_prompts(vocab_size: int, batch_size: int, length: int) -> list[list[int]]:
    """The same prompts for every contestant and round."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (batch_size, length), generator=generator).tolist()


def leading_alike(ours: list[int], theirs: list[int]) -> int:
    """How many tokens two texts begin with in common; in low precision, near ties part them sooner or later."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def transformers_generate(checkpoint_dir: Path, dtype: torch.dtype, device: torch.device) -> Generate:
    """transformers' own greedy generation, which does not stop before the count is reached."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=dtype).to(device).eval()
    greedy = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def generate_with(prompts: list[list[int]], count: int) -> list[list[int]]:
        input_ids = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=greedy,
                min_new_tokens=count,
                max_new_tokens=count,
            )
        return output[:, input_ids.shape[1] :].tolist()

    return generate_with


if __name__ == "__main__":
    run(main)
