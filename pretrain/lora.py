"""Continue pretraining on domain documents, training a LoRA adapter only.

python pretrain/lora.py --checkpoint_dir checkpoints/smollm2-135m-instruct --data_dir data/my_domain --out_dir
out/my_domain
"""

from dataclasses import dataclass

from lit_llama.command_line import run
from lit_llama.learners import LoRAArguments, lora_learner
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, start_fabric, train


@dataclass(kw_only=True)
class Arguments(LoRAArguments):
    """Continue pretraining on domain documents with LoRA; out_dir becomes a PEFT adapter directory."""


def main(arguments: Arguments) -> None:
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    corpus = Corpus.open(arguments, tokenizer)
    model, save = lora_learner(fabric, arguments)
    train(fabric, model, tokenizer, corpus, arguments, save)


if __name__ == "__main__":
    run(main)
