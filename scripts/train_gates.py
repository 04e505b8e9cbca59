"""Train the gates of an adapter on its own data, so that generate/lora.py --route_by gates can mix it with others.

python scripts/train_gates.py --checkpoint_dir checkpoints/smollm2-135m-instruct --adapter_dir out/experts/law
--data_dir data/law/tokens
"""

from dataclasses import dataclass, field
from pathlib import Path

from lit_llama.adapter_routing import GATES_FILE, inject_gates, write_gates
from lit_llama.checkpoint import load_model
from lit_llama.command_line import run
from lit_llama.config import Quantization
from lit_llama.files import refuse_overwrite
from lit_llama.parallel import loading_device
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, TrainConfig, TrainingArguments, start_fabric, train


@dataclass(kw_only=True)
class Arguments(TrainingArguments):
    """Train one sigmoid gate for each layer of a LoRA adapter, base and adapter frozen: gates.safetensors beside it.

    As PHATGOOSE (Muqeeth et al. 2024, arXiv 2402.05859): a hundred steps. data_dir is what the adapter was trained on,
    in the same form: on other text, even of the same subject, an adapter may do harm, and its gates learn to close.
    """

    adapter_dir: Path
    """The adapter; its gates are written into its directory."""
    out_dir: Path | None = None
    """Where the run is written; by default gates/ in the adapter's directory."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(max_steps=100, learning_rate=5e-3, final_learning_rate=0, warmup_steps=6)
    )
    quantize: Quantization | None = None
    """Keep the frozen base in 4 bits (nf4, nf4-dq, int4) or 8 bits (int8)."""


def main(arguments: Arguments) -> None:
    if not arguments.resume:
        refuse_overwrite(arguments.adapter_dir / GATES_FILE, arguments.overwrite)
    arguments.out_dir = arguments.out_dir or arguments.adapter_dir / "gates"
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    corpus = Corpus.open(arguments, tokenizer)
    device = loading_device(fabric, arguments.quantize)
    model = load_model(arguments.checkpoint_dir, arguments.dtype, device, arguments.quantize)
    inject_gates(model, arguments.adapter_dir)
    train(fabric, model, tokenizer, corpus, arguments, lambda directory: write_gates(model, directory))
    if fabric.is_global_zero:
        write_gates(model, arguments.adapter_dir)


if __name__ == "__main__":
    run(main)
