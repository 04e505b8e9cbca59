"""Teach a model to answer or to follow a format, training LLaMA-Adapter only: gated prompts in the top layers.

python finetune/adapter.py --checkpoint_dir checkpoints/smollm2-135m-instruct --data_dir data/my_instructions --out_dir
out/my_adapter --adapter.version 2
"""

from dataclasses import dataclass, field

from lit_llama.checkpoint import load_model
from lit_llama.command_line import run
from lit_llama.config import Embeddings, Quantization
from lit_llama.parallel import loading_device
from lit_llama.prompt_tuning import LlamaAdapterConfig, inject_llama_adapter, save_prompt_tuning
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, TrainConfig, TrainingArguments, start_fabric, train


@dataclass(kw_only=True)
class Arguments(TrainingArguments):
    """Finetune on instructions with LLaMA-Adapter; out_dir becomes an adapter directory, version 1 in PEFT's form."""

    adapter: LlamaAdapterConfig = field(default_factory=LlamaAdapterConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5, learning_rate=9e-3, weight_decay=0.02))
    quantize: Quantization | None = None
    """Keep the frozen base in 4 bits (nf4, nf4-dq, int4) or 8 bits (int8)."""
    embeddings: Embeddings | None = None
    """Embedding and head in 8 bits (int8), or the embedding in the host's memory (cpu)."""


def main(arguments: Arguments) -> None:
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    corpus = Corpus.open(arguments, tokenizer)
    device = loading_device(fabric, arguments.quantize)
    model = load_model(arguments.checkpoint_dir, arguments.dtype, device, arguments.quantize, arguments.embeddings)
    inject_llama_adapter(model, arguments.adapter)
    train(
        fabric,
        model,
        tokenizer,
        corpus,
        arguments,
        save=lambda directory: save_prompt_tuning(model, directory, base_model=str(arguments.checkpoint_dir)),
    )


if __name__ == "__main__":
    run(main)
