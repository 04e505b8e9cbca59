"""Teach a model to answer or to follow a format, training a prefix only: learned keys and values before every document.

python finetune/prefix.py --checkpoint_dir checkpoints/smollm2-135m-instruct --data_dir data/my_instructions --out_dir
out/my_prefix --prefix.init_text "Answer the question in one short sentence."
"""

from dataclasses import dataclass, field

from lit_llama.checkpoint import load_model
from lit_llama.command_line import run
from lit_llama.config import Embeddings, Quantization
from lit_llama.parallel import loading_device
from lit_llama.prompt_tuning import PrefixConfig, inject_prefix, save_prompt_tuning
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, TrainConfig, TrainingArguments, start_fabric, train


@dataclass(kw_only=True)
class Arguments(TrainingArguments):
    """Finetune on instructions with prefix tuning; out_dir becomes a PEFT adapter directory."""

    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5, learning_rate=2e-2))
    quantize: Quantization | None = None
    """Keep the frozen base in 4 bits (nf4, nf4-dq, int4) or 8 bits (int8)."""
    embeddings: Embeddings | None = None
    """Embedding and head in 8 bits (int8), or the embedding in the host's memory (cpu)."""


def main(arguments: Arguments) -> None:
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    corpus = Corpus.open(arguments, tokenizer)
    text = arguments.prefix.init_text
    token_ids = corpus.windows[0].input_ids.tolist() if text is None else tokenizer.encode(text)
    device = loading_device(fabric, arguments.quantize)
    model = load_model(arguments.checkpoint_dir, arguments.dtype, device, arguments.quantize, arguments.embeddings)
    inject_prefix(model, arguments.prefix, token_ids)
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
