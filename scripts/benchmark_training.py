"""Tokens a second and peak memory of a LoRA training step, beside transformers + PEFT on the same weights.

    python scripts/benchmark_training.py --checkpoint_dir checkpoints/smollm2-135m-instruct --out
    benchmarks/training_cpu.json

Each contestant runs in a process of its own, so that its peak memory is its own; they take turns, several rounds
each, and the median step of all rounds counts. Compare the ratios: they hold where absolute times drift with the
machine's other work.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from lit_llama.command_line import progress, run
from lit_llama.errors import InputError, RunError
from lit_llama.files import write_json
from lit_llama.hardware import peak_memory_gb, run_environment

CONTESTANTS = ("lit-llama", "transformers + peft")


def main(
    *,
    checkpoint_dir: Path,
    out: Path | None = None,
    r: int = 16,
    batch_size: int = 4,
    sequence_length: int = 512,
    steps: int = 6,
    rounds: int = 3,
    threads: int = 2,
    contestant: str | None = None,
) -> None:
    """Measure one training step: forward, backward and AdamW on random tokens, bf16 base, LoRA on all linear layers.

    Args:
        checkpoint_dir: base model.
        out: where to write the results as JSON; they also go to stdout.
        r: LoRA rank (alpha = 2 r).
        batch_size: sequences a step.
        sequence_length: tokens a sequence.
        steps: timed steps a round, after two that are not.
        rounds: how often the contestants take turns.
        threads: CPU threads.
        contestant: measure this one only, in this process, and print its round.
    """
    if contestant is not None:
        if contestant not in CONTESTANTS:
            raise InputError(f"contestant {contestant!r} is not one of {', '.join(CONTESTANTS)}")
        torch.set_num_threads(threads)
        build = own_step if contestant == "lit-llama" else peft_step
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        json.dump(measure(build(checkpoint_dir, device, r, batch_size, sequence_length), device, steps), sys.stdout)
        return
    results: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds):
        for name in CONTESTANTS:
            options = {
                "checkpoint_dir": checkpoint_dir, "contestant": name, "r": r, "batch_size": batch_size,
                "sequence_length": sequence_length, "steps": steps, "threads": threads,
            }  # fmt: skip
            command = [sys.executable, __file__, *(f"--{option}={value}" for option, value in options.items())]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode:
                raise RunError(f"{name} failed: {process.stderr.strip().splitlines()[-1]}")
            results[name].append(json.loads(process.stdout))
            seconds = statistics.median(results[name][-1]["seconds"])
            progress(f"round {number + 1}/{rounds}  {name}: {batch_size * sequence_length / seconds:.0f} tokens/s")
    summary = {}
    for name, measured in results.items():
        seconds = statistics.median(second for one in measured for second in one["seconds"])
        summary[name] = {
            "tokens_per_second": batch_size * sequence_length / seconds,
            "median_step_seconds": seconds,
            "peak_memory_gb": max(one["peak_memory_gb"] for one in measured),
            "rounds": measured,
        }
    own, peer = (summary[name] for name in CONTESTANTS)
    report = {
        "setting": {
            "checkpoint": checkpoint_dir.name, "precision": "bf16", "r": r, "targets": "all linear layers",
            "batch_size": batch_size, "sequence_length": sequence_length, "threads": threads,
        },
        "results": summary,
        "speed_ratio": own["tokens_per_second"] / peer["tokens_per_second"],
        "memory_ratio": own["peak_memory_gb"] / peer["peak_memory_gb"],
        **run_environment(peers=("transformers", "peft")),
    }  # fmt: skip
    if out is not None:
        write_json(out, report)
    print(json.dumps(report, indent=2))


def measure(step: object, device: torch.device, steps: int) -> dict:
    """Seconds of each timed step and the peak memory of the process (CPU) or the device."""
    seconds = []
    for number in range(steps + 2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "peak_memory_gb": peak_memory_gb(device)}


def random_tokens(vocab_size: int, batch_size: int, length: int, device: torch.device) -> torch.Tensor:
    """(batch_size, length) token ids, the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (batch_size, length), generator=generator).to(device)


def own_step(checkpoint_dir: Path, device: torch.device, r: int, batch_size: int, length: int) -> object:
    """A function that trains one step with this project's parts."""
    from lit_llama.checkpoint import load_model
    from lit_llama.lora import LoRAConfig, inject_lora
    from lit_llama.loss import linear_cross_entropy

    model = load_model(checkpoint_dir, torch.bfloat16, device)
    inject_lora(model, LoRAConfig(r=r, alpha=2 * r))
    model.train()
    tokens = random_tokens(model.config.vocab_size, batch_size, length + 1, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        hidden = model.model(tokens[:, :-1])
        linear_cross_entropy(hidden, model.lm_head.weight, tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(checkpoint_dir: Path, device: torch.device, r: int, batch_size: int, length: int) -> object:
    """The same step with transformers' model and loss and PEFT's adapter."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.bfloat16).to(device)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets))
    model.train()
    tokens = random_tokens(model.config.vocab_size, batch_size, length, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    run(main)
