"""Memory of full finetuning, LoRA and QLoRA: measured on a small model, and by the estimate for larger ones.

python -m benchmarks.finetune.memory --checkpoint_dir checkpoints/smollm2-135m-instruct --data_dir STORE

"65 % less memory" means little without what it is less than, so that every saving is given three times: of the weights
alone, of the whole run against LoRA on a bf16 base, and against full finetuning.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.finetune.runs import Run, complete, read
from lit_llama.activations import ActivationConfig
from lit_llama.checkpoint import load_model
from lit_llama.command_line import run
from lit_llama.config import LlamaConfig
from lit_llama.files import write_json
from lit_llama.hardware import run_environment
from lit_llama.lora import LoRAConfig
from lit_llama.memory_estimate import TrainingSetup, estimate_memory

ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "full": ("finetune/full.py", ()),
    "LoRA": ("finetune/lora.py", ()),
    "LoRA, int8 base": ("finetune/lora.py", ("--quantize", "int8")),
    "QLoRA, NF4": ("finetune/lora.py", ("--quantize", "nf4")),
    "QLoRA, NF4 double": ("finetune/lora.py", ("--quantize", "nf4-dq")),
}
LARGER = {"TinyLlama 1.1B": "tinyllama-1.1b", "Llama 2 7B": "llama-2-7b", "Llama 3 8B": "llama-3-8b"}


def main(
    *,
    checkpoint_dir: Path,
    data_dir: Path,
    work_dir: Path = Path("out/benchmark-memory"),
    out: Path | None = None,
) -> None:
    """Measure and estimate.

    Args:
        checkpoint_dir: Base model that is measured.
        data_dir: Token store or instruction store to train on.
        work_dir: Where the runs are written; those that are there are not repeated.
        out: Write the results to this file too.
    """
    options = {
        "checkpoint_dir": checkpoint_dir, "data_dir": data_dir, "train.max_steps": 4, "train.micro_batch_size": 1,
        "train.global_batch_size": 1, "train.sequence_length": 512, "eval.max_windows": 1, "eval.batch_size": 1,
    }  # fmt: skip
    arguments = tuple(text for name, value in options.items() for text in (f"--{name}", str(value)))
    runs = {
        arm: Run(script, work_dir / arm.replace(", ", "-").replace(" ", "-"), (*own, *arguments))
        for arm, (script, own) in ARMS.items()
    }
    complete(list(runs.values()), workers=1, threads=1)
    measured = {}
    for arm, (_, own) in ARMS.items():
        report = read(runs[arm], "report.json")
        quantize = own[1] if own else None
        (state,) = (runs[arm].out_dir / "state").glob("*.safetensors")
        with safe_open(state, "pt") as file:
            sizes = {name: file.get_slice(name) for name in file.keys()}
            moments = [name for name in sizes if not name.startswith(("parameter.", "random"))]
            optimizer = sum(file.get_tensor(name).nbytes for name in moments)
        model = load_model(checkpoint_dir, torch.bfloat16, torch.device("cpu"), quantize)
        weights = sum(tensor.numel() * tensor.itemsize for tensor in (*model.parameters(), *model.buffers()))
        trained = report["trainable_parameters"]
        measured[arm] = {
            "weights_mb": weights / 1e6,
            # fp32, whether they are an adapter or the masters of bf16 weights
            "trained_mb": 4 * trained / 1e6,
            "optimizer_mb": optimizer / 1e6,
            "trainable_parameters": trained,
            "peak_mb": report["peak_memory_gb"] * 1e3,
        }
    result = {
        "setting": {
            "model": checkpoint_dir.name, "r": LoRAConfig().r, "batch_size": 1, "sequence_length": 512,
            "device": "cpu", "peak": "of the process, Python and libraries included",
        },
        "measured": measured,
        "estimated": {name: estimates(architecture) for name, architecture in LARGER.items()},
        **run_environment(),
    }  # fmt: skip
    if out is not None:
        write_json(out, result)
    print(json.dumps(result, indent=2))


def estimates(architecture: str) -> dict:
    """Gigabytes by part on a CUDA card, 1 x 2,048 tokens with every layer checkpointed, and what is saved."""
    config = LlamaConfig.from_name(architecture)
    settings = {"micro_batch_size": 1, "sequence_length": 2048, "activations": ActivationConfig(checkpoint=1)}
    setups = {
        "full": TrainingSetup(lora=None, **settings),
        "LoRA": TrainingSetup(**settings),
        "QLoRA, NF4 double": TrainingSetup(quantize="nf4-dq", **settings),
    }
    parts = {arm: estimate_memory(config, setup) for arm, setup in setups.items()}
    peaks = {arm: sum(sizes.values()) for arm, sizes in parts.items()}
    qlora = "QLoRA, NF4 double"
    return {
        "parts_gb": {arm: {name: size / 1e9 for name, size in sizes.items()} for arm, sizes in parts.items()},
        "peak_gb": {arm: size / 1e9 for arm, size in peaks.items()},
        "qlora_saves": {
            "of_the_weights": 1 - parts[qlora]["weights"] / parts["LoRA"]["weights"],
            "of_lora": 1 - peaks[qlora] / peaks["LoRA"],
            "of_full": 1 - peaks[qlora] / peaks["full"],
        },
    }


if __name__ == "__main__":
    run(main)
