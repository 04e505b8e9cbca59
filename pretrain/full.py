"""Continue pretraining on domain documents, training all weights.

python pretrain/full.py --checkpoint_dir checkpoints/smollm2-135m-instruct --data_dir data/my_domain --out_dir
out/my_domain_full
"""

from dataclasses import dataclass, field

from lit_llama.command_line import run
from lit_llama.learners import full_learner
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
    model, save = full_learner(fabric, arguments)
    train(fabric, model, tokenizer, corpus, arguments, save)


if __name__ == "__main__":
    run(main)
