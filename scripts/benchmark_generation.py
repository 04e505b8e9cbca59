"""Tokens a second of greedy generation and of prefill, also with weights in 8 bits, beside transformers.

    python scripts/benchmark_generation.py --checkpoint_dir checkpoints/smollm2-135m-instruct --out
    benchmarks/generation_cpu.json

The contestants take turns in one process, several rounds each, and the median counts. Compare the ratios: they hold
where absolute times drift with the machine's other work.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lit_llama.answering import bytes_per_step
from lit_llama.checkpoint import load_model
from lit_llama.command_line import progress, run
from lit_llama.errors import InputError
from lit_llama.files import refuse_overwrite, write_json
from lit_llama.generation import generate, prepare_to_generate
from lit_llama.hardware import peak_memory_gb, pick_device, pick_dtype, run_environment

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, new tokens) -> exactly so many new tokens of each prompt, greedily."""


def main(
    *,
    checkpoint_dir: Path,
    out: Path | None = None,
    batch_size: int = 1,
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    prefill_tokens: int = 1024,
    rounds: int = 5,
    threads: int = 2,
    dtype: str = "bf16",
    device: str = "auto",
    peer: bool = True,
    overwrite: bool = False,
) -> None:
    """Measure greedy generation from random prompts, and the time to the first token after a long one.

    Args:
        checkpoint_dir: Base model.
        out: Where to write the results as JSON; they also go to stdout.
        batch_size: Prompts at a time.
        prompt_tokens: Length of the prompts that are continued.
        new_tokens: Tokens to generate after each.
        prefill_tokens: Length of the prompts whose first new token is waited for.
        rounds: How often the contestants take turns, after one round that is not timed.
        threads: CPU threads.
        dtype: bf16, fp16 or fp32.
        device: cpu, cuda, mps, or auto for the best there is.
        peer: Measure transformers too.
        overwrite: Replace the file.
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
    torch.set_num_threads(threads)
    place = pick_device(device)
    precision = pick_dtype(dtype, place)

    contestants: dict[str, Generate] = {}
    weight_bytes = {}
    for name, stored in {"lit-llama": None, "lit-llama int8": "int8"}.items():
        model = load_model(checkpoint_dir, precision, place, quantize=stored, embeddings=stored)
        weight_bytes[name], vocab_size = bytes_per_step(model), model.config.vocab_size
        prepare_to_generate(model)
        contestants[name] = partial(generate, model)
    if peer:
        weight_bytes["transformers"] = weight_bytes["lit-llama"]
        contestants["transformers"] = transformers_generate(checkpoint_dir, precision, place)

    seconds: dict[str, dict[str, list[float]]] = {name: {"generate": [], "prefill": []} for name in contestants}
    texts: dict[str, list[list[int]]] = {}
    for number in range(rounds + 1):
        for name, generate_with in contestants.items():
            texts[name], generating = timed(
                generate_with, random_prompts(vocab_size, batch_size, prompt_tokens), new_tokens
            )
            _, prefilling = timed(generate_with, random_prompts(vocab_size, batch_size, prefill_tokens), 1)
            if number > 0:
                seconds[name]["generate"].append(generating)
                seconds[name]["prefill"].append(prefilling)
                rate = batch_size * new_tokens / generating
                progress(f"round {number}/{rounds}  {name}: {rate:.1f} tokens/s, first token after {prefilling:.2f} s")

    results = {}
    for name, measured in seconds.items():
        generating, prefilling = (statistics.median(measured[what]) for what in ("generate", "prefill"))
        results[name] = {
            "generate_tokens_per_second": batch_size * new_tokens / generating,
            "weights_gb_per_second": weight_bytes[name] * new_tokens / generating / 1e9,
            "prefill_tokens_per_second": batch_size * prefill_tokens / prefilling,
            "seconds": measured,
        }
    report = {
        "setting": {"checkpoint": checkpoint_dir.name, "dtype": dtype, "device": str(place), **numbers},
        "results": results,
        "peak_memory_gb_of_all": peak_memory_gb(place),
    }
    if peer:
        for what in ("generate", "prefill"):
            key, other = f"{what}_tokens_per_second", results["transformers"]
            report[f"{what}_speed_ratio"] = {
                name: own[key] / other[key] for name, own in results.items() if name != "transformers"
            }
        report["leading_tokens_alike"] = [
            leading_alike(ours, theirs) for ours, theirs in zip(texts["lit-llama"], texts["transformers"], strict=True)
        ]
    report |= run_environment(peers=("transformers",) if peer else ())
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
    try:
        import transformers
    except ImportError:
        raise InputError("the comparison needs transformers: pip install transformers, or pass --peer false") from None
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
