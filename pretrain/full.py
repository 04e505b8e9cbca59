"""Continue pretraining on domain documents, training all weights.

python pretrain/full.py --checkpoint_dir checkpoints/smollm2-135m-instruct --data_dir data/my_domain --out_dir
out/my_domain_full
"""

from dataclasses import dataclass, field

from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.command_line import run
from lit_llama.parallel import loading_device
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, TrainConfig, TrainingArguments, start_fabric, train


@dataclass(kw_only=True)
class Arguments(TrainingArguments):
    """Continue pretraining on domain documents, training all weights; the model is written to out_dir/checkpoint."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=3e-5))


def main(arguments: Arguments) -> None:
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    corpus = Corpus.open(arguments, tokenizer)
    model = load_model(arguments.checkpoint_dir, arguments.dtype, loading_device(fabric))
    model.requires_grad_(True)
    train(
        fabric,
        model,
        tokenizer,
        corpus,
        arguments,
        save=lambda directory: save_checkpoint(
            model, directory / "checkpoint", tokenizer_from=arguments.checkpoint_dir, overwrite=True
        ),
    )


if __name__ == "__main__":
    run(main)
