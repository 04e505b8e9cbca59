"""What a bank of adapters costs: switching, and a batch in which each row takes another, beside one adapter for all.

    python scripts/benchmark_adapters.py --checkpoint_dir checkpoints/smollm2-135m-instruct
    python scripts/benchmark_adapters.py --model llama-3-8b --device cuda --out benchmarks/adapters_cuda_8b.json

The contestants take turns in one process, several rounds each, and the median counts. Compare the ratios: they hold
where absolute times drift with the machine's other work.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark_contestants import Shape, own_model

from lit_llama.adapter_files import PEFT_PREFIX, write_adapter
from lit_llama.adapters import AdapterBank
from lit_llama.command_line import progress, run
from lit_llama.config import Quantization
from lit_llama.errors import InputError
from lit_llama.files import refuse_overwrite, write_json
from lit_llama.generation import Speed, generate_stream
from lit_llama.hardware import peak_memory_gb, pick_device, run_environment
from lit_llama.lora import LINEAR_NAMES
from lit_llama.model import Llama
from lit_llama.packed_linear import pack_linear_layers


def main(
    *,
    checkpoint_dir: Path | None = None,
    model: str | None = None,
    out: Path | None = None,
    r: int = 16,
    batch_size: int = 16,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    quantize: Quantization | None = None,
    rounds: int = 5,
    threads: int = 2,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Measure greedy generation without an adapter, with one, and with another in each row; and switching between them.

    Args:
        checkpoint_dir: base model.
        model: or the name of an architecture, with random weights.
        out: where to write the results as JSON; they also go to stdout.
        r: rank of the adapters, which are random and on all linear layers.
        batch_size: prompts at a time, and adapters in the bank.
        prompt_tokens: length of the prompts.
        new_tokens: tokens to generate after each.
        quantize: store the base weights in 4 or 8 bits.
        rounds: how often the contestants take turns, after one round that is not timed.
        threads: CPU threads.
        device: cpu, cuda, mps, or auto for the best there is.
        overwrite: replace the file.
    """
    if out is not None:
        refuse_overwrite(out, overwrite)
    if (checkpoint_dir is None) == (model is None):
        raise InputError("give --checkpoint_dir or --model, one of them")
    least = {"r": 1, "batch_size": 2, "prompt_tokens": 1, "new_tokens": 2, "rounds": 1, "threads": 1}
    given = dict(zip(least, (r, batch_size, prompt_tokens, new_tokens, rounds, threads), strict=True))
    for name, value in given.items():
        if value < least[name]:
            raise InputError(f"--{name} {value} must be at least {least[name]}")
    torch.set_num_threads(threads)
    place = pick_device(device)
    shape = Shape(checkpoint_dir, model, place, r, batch_size, prompt_tokens, None)
    base = own_model(shape, quantize, None)
    pack_linear_layers(base)
    bank = AdapterBank(base)
    names = [str(number) for number in range(batch_size)]
    with tempfile.TemporaryDirectory() as directory:
        write_random_adapter(base, Path(directory), r)
        loading = [seconds(lambda name=name: bank.load(name, directory), place) for name in names]

    # Two batches of several: neither's layout serves the other, so that each selection makes one.
    selections = {"base": None, "one adapter": names[0], "another adapter": names[1], "mixed": names}
    selections["mixed with base"] = [*names[1:], None]
    timed = {name: [] for name in selections if "another" not in name}
    switching = {name: [] for name in selections}
    prompts = shape.tokens(extra=0).tolist()
    for number in range(rounds + 1):
        for name, selection in selections.items():
            switch = seconds(lambda selection=selection: bank.select(selection), place)
            if number > 0:
                switching[name].append(switch)
            if name not in timed:
                continue
            speed = Speed()
            list(generate_stream(base, prompts, new_tokens, speed=speed))
            if number > 0:
                timed[name].append({"prefill": speed.prefill_seconds, "step": speed.decode_seconds / speed.steps})
                progress(f"round {number}/{rounds}  {name}: {1000 * timed[name][-1]['step']:.1f} ms a step")

    results = {
        name: {
            "prefill_seconds": statistics.median(one["prefill"] for one in measured),
            "step_seconds": statistics.median(one["step"] for one in measured),
            "rounds": measured,
        }
        for name, measured in timed.items()
    }
    report = {
        "setting": {**shape.description(), **given, "quantize": quantize},
        "results": results,
        "step_of_mixed_against_one_adapter": results["mixed"]["step_seconds"] / results["one adapter"]["step_seconds"],
        "prefill_of_mixed_against_one_adapter": results["mixed"]["prefill_seconds"]
        / results["one adapter"]["prefill_seconds"],
        "step_of_one_adapter_against_base": results["one adapter"]["step_seconds"] / results["base"]["step_seconds"],
        "switch_milliseconds": {name: 1000 * statistics.median(measured) for name, measured in switching.items()},
        "load_milliseconds": 1000 * statistics.median(loading),
        "peak_memory_gb": peak_memory_gb(place),
        **run_environment(),
    }
    if out is not None:
        write_json(out, report)
    print(json.dumps(report, indent=2))


def write_random_adapter(model: Llama, directory: Path, r: int) -> None:
    """An adapter directory with small random updates of all linear layers."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LINEAR_NAMES:
            for side, shape in (("A", (r, module.in_features)), ("B", (module.out_features, r))):
                weight = torch.randn(shape, generator=generator).mul_(0.01)
                state[f"{PEFT_PREFIX}{name}.lora_{side}.weight"] = weight
    description = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": list(LINEAR_NAMES)}
    write_adapter(directory, description, state, model.fingerprint)


def seconds(do: Callable[[], None], device: torch.device) -> float:
    """How long it takes until it is done on the device too."""
    start = time.perf_counter()
    do()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main)
