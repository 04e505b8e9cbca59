"""Teach a model to answer or to follow a format, training all weights.

python finetune/full.py --checkpoint_dir checkpoints/smollm2-135m-instruct --data_dir data/my_instructions --out_dir
out/my_expert_full
"""

from dataclasses import dataclass, field

from lit_llama.command_line import run
from lit_llama.learners import full_learner
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, TrainConfig, TrainingArguments, start_fabric, train


@dataclass(kw_only=True)
class Arguments(TrainingArguments):
    """Finetune on instructions, training all weights; the model is written to out_dir/checkpoint.

    data_dir is an instruction store, made by scripts/prepare_instructions.py; the checkpoint gets the chat template of
    its prompt style.
    """

    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=3, learning_rate=2e-5))


def main(arguments: Arguments) -> None:
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    corpus = Corpus.open(arguments, tokenizer)
    model, save = full_learner(fabric, arguments)
    train(fabric, model, tokenizer, corpus, arguments, save)


if __name__ == "__main__":
    run(main)
