"""Teach a model, plain or pretrained on a domain, to answer or to follow a format, training a LoRA adapter only.

python finetune/lora.py --checkpoint_dir checkpoints/smollm2-135m-instruct --data_dir data/my_instructions --out_dir
out/my_expert --start_adapter out/my_domain
"""

from dataclasses import dataclass, field

from lit_llama.command_line import run
from lit_llama.learners import LoRAArguments, lora_learner
from lit_llama.mlp_partition import MLPRoutingConfig, route_mlp
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, TrainConfig, start_fabric, train


@dataclass(kw_only=True)
class Arguments(LoRAArguments):
    """Finetune on instructions with LoRA (QLoRA with --quantize); out_dir becomes a PEFT adapter directory.

    data_dir is an instruction store, made by scripts/prepare_instructions.py; its prompt style is kept with the adapter
    and generate/lora.py uses it unasked.
    """

    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=3, learning_rate=2e-4))
    partition: MLPRoutingConfig | None = None
    """Route tokens through some experts of each MLP; for a checkpoint of scripts/partition_mlp.py."""


def main(arguments: Arguments) -> None:
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    corpus = Corpus.open(arguments, tokenizer)
    model, save = lora_learner(fabric, arguments)
    if arguments.partition is not None:
        route_mlp(model, arguments.partition)
    train(fabric, model, tokenizer, corpus, arguments, save)


if __name__ == "__main__":
    run(main)
