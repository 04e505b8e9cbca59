"""Teach a model to answer or to follow a format, training a tree of LoRA adapters only.

python finetune/lora_tree.py --checkpoint_dir checkpoints/smollm2-135m-instruct --data_dir data/my_instructions
--out_dir out/my_tree
"""

from dataclasses import dataclass, field

from lit_llama.command_line import run
from lit_llama.learners import LoRATreeArguments, lora_tree_learner
from lit_llama.lora_tree import routing_figures
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, TrainConfig, start_fabric, train


@dataclass(kw_only=True)
class Arguments(LoRATreeArguments):
    """Finetune on instructions with a tree of LoRA adapters; out_dir becomes an adapter directory.

    data_dir is an instruction store, made by scripts/prepare_instructions.py; its prompt style is kept with the adapter
    and generate/lora.py uses it unasked.
    """

    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=3, learning_rate=2e-4))


def main(arguments: Arguments) -> None:
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    corpus = Corpus.open(arguments, tokenizer)
    model, save = lora_tree_learner(fabric, arguments)
    corpus.measure = lambda model: routing_figures(model, corpus.held_out, arguments.eval.batch_size)
    train(fabric, model, tokenizer, corpus, arguments, save)


if __name__ == "__main__":
    run(main)
