"""Let a model with a LoRA adapter answer.

python generate/lora.py --checkpoint_dir checkpoints/smollm2-135m-instruct --adapter_dir out/my_domain --prompt "What is
the capital of Norway?"
"""

from dataclasses import dataclass
from pathlib import Path

from lit_llama.answering import AnswerArguments, answer_prompts
from lit_llama.command_line import run


@dataclass(kw_only=True)
class Arguments(AnswerArguments):
    """Let a base model with a LoRA adapter answer: one prompt, many out of a file, standard input, or what you type."""

    adapter_dir: Path
    """Adapter to put on the base, as pretrain/lora.py or PEFT writes it."""


def main(arguments: Arguments) -> None:
    answer_prompts(arguments, arguments.adapter_dir)


if __name__ == "__main__":
    run(main)
