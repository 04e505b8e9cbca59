"""Predict the memory that training will take, part by part, and what would fit a card.

python scripts/estimate_memory.py --checkpoint_dir checkpoints/smollm2-135m-instruct --card_gb 8
python scripts/estimate_memory.py --model llama-3.1-8b --quantize nf4-dq --card_gb 24
"""

import importlib
import json
from itertools import islice
from pathlib import Path

import torch

from lit_llama.activations import ActivationConfig
from lit_llama.command_line import run
from lit_llama.config import Embeddings, LlamaConfig, Quantization
from lit_llama.errors import InputError
from lit_llama.hardware import peak_memory_gb
from lit_llama.lora import LoRAConfig
from lit_llama.memory_estimate import TrainingSetup, estimate_memory, fitting_setups, longest_sequence


def main(
    *,
    checkpoint_dir: Path | None = None,
    model: str | None = None,
    card_gb: float | None = None,
    full: bool = False,
    lora: LoRAConfig = LoRAConfig(),  # noqa: B008, never changed
    quantize: Quantization | None = None,
    embeddings: Embeddings | None = None,
    optimizer: str = "adamw",
    activations: ActivationConfig = ActivationConfig(),  # noqa: B008, never changed
    micro_batch_size: int = 4,
    sequence_length: int = 512,
    precision: str = "bf16",
    device: str = "cuda",
    json_output: bool = False,
) -> None:
    """Predict peak memory of training by part; with --card_gb also propose settings that fit.

    Args:
        checkpoint_dir: the base model.
        model: or the name of an architecture, such as llama-3.1-8b; no weights are needed.
        card_gb: memory of the card in 10^9 bytes; a twentieth of it is left for the CUDA context and fragments.
        full: all weights are trained instead of an adapter.
        lora: see pretrain/lora.py.
        quantize: base weights in 4 or 8 bits.
        embeddings: embedding and head in int8, or the embedding in the host's memory (cpu).
        optimizer: see train.optimizer.
        activations: see pretrain/lora.py.
        micro_batch_size: windows a forward pass.
        sequence_length: tokens a window.
        precision: of base weights and computation, bf16 or fp32.
        device: cuda or cpu, which keep different things while they compute.
        json_output: print JSON instead of a table.
    """
    if (checkpoint_dir is None) == (model is None):
        raise InputError("give --checkpoint_dir or --model, one of them")
    if full and quantize:
        raise InputError("--full trains all weights: they cannot be quantized")
    config = LlamaConfig.from_json(checkpoint_dir) if checkpoint_dir else LlamaConfig.from_name(model)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if precision not in dtypes:
        raise InputError(f"--precision {precision!r} is not one of {', '.join(dtypes)}")
    setup = TrainingSetup(
        None if full else lora, quantize, embeddings, optimizer, activations, micro_batch_size, sequence_length,
        dtypes[precision], device,
    )  # fmt: skip
    parts = estimate_memory(config, setup)
    if device == "cpu":
        importlib.import_module("lit_llama.training")  # what a training process has loaded before its model
        parts["process"] = round(peak_memory_gb(torch.device("cpu")) * 1e9)
    result = {"parts": parts, "peak": sum(parts.values())}
    if card_gb is not None:
        budget = int(0.95 * card_gb * 1e9)
        result["fits"] = result["peak"] <= budget
        result["longest_sequence"] = min(longest_sequence(config, setup, budget), config.max_position_embeddings)
        result["proposals"] = [
            {"settings": proposal.switches(), "peak": sum(estimate_memory(config, proposal).values())}
            for proposal in islice(fitting_setups(config, setup, budget), 3)
        ]
    if json_output:
        print(json.dumps(result, indent=2))
        return
    for name, size in [*parts.items(), ("peak", result["peak"])]:
        print(f"{name:16} {size / 1e9:8.2f} GB")
    if card_gb is None:
        return
    print(f"\nof {card_gb:g} GB, {budget / 1e9:.1f} usable: {'fits' if result['fits'] else 'does not fit'}")
    print(f"longest window of these settings: {result['longest_sequence']:,} tokens")
    for proposal in result["proposals"]:
        print(f"{proposal['peak'] / 1e9:8.2f} GB  {proposal['settings']}")
    if not result["proposals"]:
        print("nothing tried fits: take a smaller model or more cards")


if __name__ == "__main__":
    run(main)
