"""What may end a run from outside: a signal, and memory that does not suffice.

A full disk is `run_files`'s, which knows what has been saved; a loss that is not finite is the loop's.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lit_llama.command_line import progress
from lit_llama.errors import RunError
from lit_llama.lora import LoRAConfig
from lit_llama.memory_estimate import TrainingSetup, fitting_setups, peak
from lit_llama.model import Llama

if TYPE_CHECKING:
    from lit_llama.training import RunArguments


@contextmanager
def out_of_memory_explained(model: Llama, arguments: "RunArguments", device: torch.device) -> Iterator[None]:
    """Answer an out-of-memory error with settings that need less, by the estimate of `memory_estimate.py`."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        train = arguments.train
        adapter = getattr(model, "lora_config", None)
        # The nearest that the estimate knows.
        if adapter is None and getattr(model, "prompt_tuning_config", None) is not None:
            adapter = LoRAConfig(r=1)
        elif (tree := getattr(model, "lora_tree", None)) is not None:
            adapter = LoRAConfig(r=tree.config.leaves * tree.config.r, targets=tree.config.targets)
        setup = TrainingSetup(
            adapter,
            getattr(arguments, "quantize", None),
            getattr(arguments, "embeddings", None),
            train.optimizer,
            arguments.activations,
            train.micro_batch_size,
            train.sequence_length,
            arguments.dtype,
            device.type,
        )
        needed = peak(model.config, setup)
        budget = 0.9 * needed
        if device.type == "cuda":
            budget = min(budget, 0.95 * torch.cuda.get_device_properties(device).total_memory)
        lighter = next(fitting_setups(model.config, setup, int(budget)), None)
        advice = "take a smaller model or a larger card"
        if lighter is not None:
            changed = " ".join(lighter.differences(setup))
            again = "go on with --resume true" if lighter.resumes(setup) else "start again"
            advice = f"{again} and {changed} (about {peak(model.config, lighter) / 1e9:.1f} GB)"
        raise RunError(
            f"out of memory on {device} at about {needed / 1e9:.1f} GB ({str(error).splitlines()[0][:120]}):"
            f" {advice}; scripts/estimate_memory.py shows more"
        ) from None


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying, so that the step under way ends and is saved; a second one kills."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        progress("stopping after this step (once more to stop at once, losing what is not saved)")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
