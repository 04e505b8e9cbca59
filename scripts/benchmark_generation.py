"""Tokens a second of greedy generation and of prefill, however weights and cache are held, beside transformers.

    python scripts/benchmark_generation.py --checkpoint_dir checkpoints/smollm2-135m-instruct --out
    benchmarks/generation_cpu.json
    python scripts/benchmark_generation.py --model llama-3-8b --device cuda --contestants '["lit-llama compile"]'

Each contestant runs in a process of its own; they take turns, several rounds each, and the median counts. Compare the
ratios: they hold where absolute times drift with the machine's other work. With --text the perplexity of each on it
says what holding weights or cache in fewer bits costs.
"""

import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_contestants import Shape, own_model
from torch import Tensor, nn

from lit_llama.answering import bytes_per_step
from lit_llama.checkpoint import existing_directory, load_model
from lit_llama.command_line import progress, run
from lit_llama.config import CacheQuantization
from lit_llama.errors import InputError, RunError
from lit_llama.files import refuse_overwrite, write_json
from lit_llama.generation import generate, logits_of, prepare_to_generate
from lit_llama.hardware import peak_memory_gb, pick_device, pick_dtype, run_environment
from lit_llama.kv_cache import KVCache
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, new tokens) -> exactly so many new tokens of each prompt, greedily."""

INT8 = {"quantize": "int8", "embeddings": "int8"}
INT4 = {"quantize": "int4", "embeddings": "int8"}
OWN: dict[str, dict[str, Any]] = {
    "lit-llama": {},
    "lit-llama int8": INT8,
    "lit-llama int8 cache": {"quantize_cache": "int8"},
    "lit-llama int8, int8 cache": {**INT8, "quantize_cache": "int8"},
    "lit-llama int4": INT4,
    "lit-llama int4, int8 cache": {**INT4, "quantize_cache": "int8"},
    "lit-llama nf4": {"quantize": "nf4"},
    "lit-llama nf4-dq": {"quantize": "nf4-dq"},
    "lit-llama compile": {"compile": True},
    "lit-llama int8 compile": {**INT8, "compile": True},
    "lit-llama int4 compile": {**INT4, "compile": True},
    "lit-llama nf4 compile": {"quantize": "nf4", "compile": True},
}
"""How weights and cache are held, and what computes a step."""
PEER = "transformers"
WINDOW, STEP = 512, 16
"""Tokens of the text that are scored in a row, and of them in a step."""
REPEATS = 3
"""Of everything that a contestant does in its turn, after once that is not timed."""


def main(
    *,
    checkpoint_dir: Path | None = None,
    model: str | None = None,
    contestants: list[str] | None = None,
    text: Path | None = None,
    text_tokens: int = 8192,
    out: Path | None = None,
    batch_size: int = 1,
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    prefill_tokens: int = 1024,
    rounds: int = 3,
    threads: int = 2,
    dtype: str = "bf16",
    device: str = "auto",
    overwrite: bool = False,
    contestant: str | None = None,
) -> None:
    """Measure greedy generation from random prompts, and the time to the first token after a long one.

    Args:
        checkpoint_dir: Base model.
        model: Or the name of an architecture, with random weights in bf16.
        contestants: By default "lit-llama", "lit-llama int8" and "transformers"; the code names all.
        text: A text file, or a folder of them, whose perplexity each contestant is asked for too.
        text_tokens: How much of it.
        out: Where to write the results as JSON; they also go to stdout.
        batch_size: Prompts at a time.
        prompt_tokens: Length of the prompts that are continued.
        new_tokens: Tokens to generate after each.
        prefill_tokens: Length of the prompts whose first new token is waited for.
        rounds: How often the contestants take turns.
        threads: CPU threads.
        dtype: bf16, fp16 or fp32.
        device: cpu, cuda, mps, or auto for the best there is.
        overwrite: Replace the file.
        contestant: Measure this one only, in this process, and print its turn.
    """
    if out is not None:
        refuse_overwrite(out, overwrite)
    numbers = {
        "batch_size": batch_size, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
        "prefill_tokens": prefill_tokens, "rounds": rounds, "threads": threads, "text_tokens": text_tokens,
    }  # fmt: skip
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    if (checkpoint_dir is None) == (model is None):
        raise InputError("give --checkpoint_dir or --model, one of them")
    if checkpoint_dir is not None:
        existing_directory(checkpoint_dir)
    names = contestants or ["lit-llama", "lit-llama int8", PEER]
    for name in names:
        if name not in (*OWN, PEER):
            raise InputError(f"contestant {name!r} is not one of {', '.join((*OWN, PEER))}")
    if PEER in names and importlib.util.find_spec("transformers") is None:
        raise InputError(
            "the comparison needs transformers: pip install transformers, or leave it out of --contestants"
        )
    if text is not None and checkpoint_dir is None:
        raise InputError("--text: random weights of --model have no perplexity worth asking for")
    place = pick_device(device)
    if contestant is not None:
        torch.set_num_threads(threads)
        base = Shape(checkpoint_dir, model, place, r=0, batch_size=batch_size, sequence_length=0, document_length=None)
        json.dump(measure(contestant, base, pick_dtype(dtype, place), numbers, text), sys.stdout)
        return

    options = {"checkpoint_dir": checkpoint_dir, "model": model, "dtype": dtype, "device": device, **numbers}
    given = [f"--{option}={value}" for option, value in options.items() if value is not None]
    turns: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            command = [sys.executable, __file__, *given, f"--contestant={name}"]
            if text is not None and number == 0:
                command.append(f"--text={text}")
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode:
                raise RunError(f"{name} failed: {(process.stderr.strip() or 'no message').splitlines()[-1]}")
            turns[name].append(turn := json.loads(process.stdout))
            generating, prefilling = (statistics.median(turn[what]) for what in ("generate", "prefill"))
            rate = batch_size * new_tokens / generating
            progress(f"round {number + 1}/{rounds}  {name}: {rate:.1f} tokens/s, first token after {prefilling:.2f} s")

    copying = copy_bandwidth(place)
    results = {}
    for name, measured in turns.items():
        seconds = {what: [second for turn in measured for second in turn[what]] for what in ("generate", "prefill")}
        generating, prefilling = (statistics.median(seconds[what]) for what in ("generate", "prefill"))
        read = measured[0]["bytes_per_step"] * new_tokens / generating / 1e9
        results[name] = {
            "generate_tokens_per_second": batch_size * new_tokens / generating,
            "gb_per_second": read,
            "share_of_copy_bandwidth": read / copying,
            "prefill_tokens_per_second": batch_size * prefill_tokens / prefilling,
            "peak_memory_gb": max(turn["peak_memory_gb"] for turn in measured),
            **({"perplexity": measured[0]["perplexity"]} if text is not None else {}),
            "seconds": seconds,
        }
    report = {
        "setting": {
            "model": model or checkpoint_dir.name, "dtype": dtype, "device": str(place), **numbers,
            "text": None if text is None else text.name,
        },
        "results": results,
        "copy_gb_per_second": copying,
    }  # fmt: skip
    if PEER in names:
        own = [name for name in names if name != PEER]
        for what in ("generate", "prefill"):
            key = f"{what}_tokens_per_second"
            report[f"{what}_speed_ratio"] = {name: results[name][key] / results[PEER][key] for name in own}
        report["leading_tokens_alike"] = {
            name: [
                leading_alike(ours, theirs)
                for ours, theirs in zip(turns[name][0]["tokens"], turns[PEER][0]["tokens"], strict=True)
            ]
            for name in own
        }
    report |= run_environment(peers=(PEER,) if PEER in names else ())
    if out is not None:
        write_json(out, report)
    print(json.dumps(report, indent=2))


def measure(name: str, base: Shape, dtype: torch.dtype, numbers: dict[str, int], text: Path | None) -> dict[str, Any]:
    """One turn of a contestant, in this process."""
    batch_size, new_tokens, config = numbers["batch_size"], numbers["new_tokens"], base.config()
    rows = None if text is None else rows_of_text(text, base.checkpoint_dir, numbers["text_tokens"]).to(base.device)
    held = dtype.itemsize  # bytes of a number in the cache
    if name == PEER:
        peer = transformers_model(base, dtype)
        weight_bytes = sum(parameter.numel() * parameter.itemsize for parameter in peer.parameters())
        if not config.tie_word_embeddings:
            weight_bytes -= config.vocab_size * config.hidden_size * dtype.itemsize
        generate_with = transformers_generate(peer)
        score = partial(transformers_losses, peer)
    else:
        way = OWN[name]
        quantize, embeddings, cache = (way.get(key) for key in ("quantize", "embeddings", "quantize_cache"))
        if base.checkpoint_dir is None:
            model = own_model(base, quantize, embeddings).eval()
        else:
            model = load_model(base.checkpoint_dir, dtype, base.device, quantize, embeddings).eval()
        weight_bytes = bytes_per_step(model)
        if cache is not None:
            held = 1 + 4 / config.head_dim
        prepare_to_generate(model, way.get("compile", False))
        generate_with = partial(generate, model, quantize_cache=cache)
        score = partial(step_losses, model, quantize_cache=cache)
    short, long = (
        random_prompts(config.vocab_size, batch_size, numbers[which]) for which in ("prompt_tokens", "prefill_tokens")
    )
    generating = [timed(generate_with, short, new_tokens) for _ in range(1 + REPEATS)]
    prefilling = [timed(generate_with, long, 1) for _ in range(1 + REPEATS)]
    peak = peak_memory_gb(base.device)  # without what scoring the text takes
    losses = None if rows is None else score(rows)
    cached = batch_size * (numbers["prompt_tokens"] + new_tokens / 2)  # tokens, on average
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * held
    return {
        "generate": [seconds for _, seconds in generating[1:]],
        "prefill": [seconds for _, seconds in prefilling[1:]],
        "tokens": generating[0][0],
        "bytes_per_step": weight_bytes + cached * size,
        "peak_memory_gb": peak,
        "perplexity": None if losses is None else math.exp(statistics.mean(losses)),
    }


def rows_of_text(path: Path, checkpoint_dir: Path, tokens: int) -> Tensor:
    """Ids (rows, WINDOW) of the beginning of a text, or of the texts of a folder one after the other."""
    files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path]
    tokenizer, ids = Tokenizer.from_checkpoint(checkpoint_dir), []
    for file in files:
        ids += tokenizer.encode(file.read_text(encoding="utf-8"))
        if len(ids) >= tokens:
            break
    if len(ids) < WINDOW:
        raise InputError(f"--text {path}: {len(ids)} tokens; at least {WINDOW} are needed")
    rows = min(len(ids), tokens) // WINDOW or 1
    return torch.tensor(ids[: rows * WINDOW]).view(rows, WINDOW)


@torch.inference_mode()
def step_losses(model: Llama, rows: Tensor, quantize_cache: CacheQuantization | None) -> list[float]:
    """Loss of each token in its row, computed as steps of generation are."""
    losses: list[float] = []
    for batch in rows.split(8):
        weight = model.model.norm.weight
        cache = KVCache(model.config, len(batch), WINDOW, weight.dtype, weight.device, quantize=quantize_cache)
        logits = [logits_of(model, piece.contiguous(), cache).clone() for piece in batch.split(STEP, dim=1)]
        losses += token_losses(torch.cat(logits, dim=1), batch)
    return losses


@torch.inference_mode()
def transformers_losses(model: nn.Module, rows: Tensor) -> list[float]:
    """The same by transformers' forward pass."""
    return [loss for row in rows for loss in token_losses(model(row[None]).logits, row[None])]


def token_losses(logits: Tensor, rows: Tensor) -> list[float]:
    """Of what follows the first token of each row."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none").tolist()


def copy_bandwidth(device: torch.device) -> float:
    """GB/s, read and written, of the fastest of several copies of a large tensor: what memory gives a program."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * len(source) / min(seconds) / 1e9


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


def transformers_model(base: Shape, dtype: torch.dtype) -> nn.Module:
    """The peer's own model, of the checkpoint or of random weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if base.checkpoint_dir is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base.checkpoint_dir, dtype=dtype)
    else:
        with torch.device(base.device):
            config = transformers.LlamaConfig(**base.config().to_huggingface())
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(base.device).eval()


def transformers_generate(model: nn.Module) -> Generate:
    """transformers' own greedy generation, which does not stop before the count is reached."""
    import transformers

    greedy = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def generate_with(prompts: list[list[int]], count: int) -> list[list[int]]:
        input_ids = torch.tensor(prompts, device=model.device)
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
