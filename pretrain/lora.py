"""Continue pretraining on domain documents, training a LoRA adapter only.

python pretrain/lora.py --checkpoint_dir checkpoints/smollm2-135m-instruct --data_dir data/my_domain --out_dir
out/my_domain
"""

from dataclasses import dataclass, field

from lit_llama.checkpoint import load_model
from lit_llama.command_line import progress, run
from lit_llama.lora import LoRAConfig, inject_lora, save_adapter, trained_summary
from lit_llama.parallel import loading_device
from lit_llama.quantization import Embeddings, Quantization
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, TrainingArguments, start_fabric, train


@dataclass(kw_only=True)
class Arguments(TrainingArguments):
    """Continue pretraining on domain documents with LoRA; out_dir becomes a PEFT adapter directory."""

    lora: LoRAConfig = field(default_factory=LoRAConfig)
    quantize: Quantization | None = None
    """Keep the frozen base in 4 bits (nf4, nf4-dq) or 8 bits (int8)."""
    embeddings: Embeddings | None = None
    """Embedding and head in 8 bits (int8), or the embedding in the host's memory (cpu)."""


def main(arguments: Arguments) -> None:
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    corpus = Corpus.open(arguments, tokenizer)
    device = loading_device(fabric, arguments.quantize)
    model = load_model(arguments.checkpoint_dir, arguments.dtype, device, arguments.quantize, arguments.embeddings)
    inject_lora(model, arguments.lora)
    if fabric.is_global_zero:
        progress(trained_summary(model))
    train(
        fabric,
        model,
        tokenizer,
        corpus,
        arguments,
        save=lambda directory: save_adapter(model, directory, base_model=str(arguments.checkpoint_dir)),
    )


if __name__ == "__main__":
    run(main)
