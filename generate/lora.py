"""Let a model with a LoRA adapter, or with the one of several that suits a prompt, answer.

python generate/lora.py --checkpoint_dir checkpoints/smollm2-135m-instruct --adapter_dir out/my_domain --prompt "What is
the capital of Norway?"
"""

from dataclasses import dataclass
from pathlib import Path

from lit_llama.adapter_routing import Method
from lit_llama.answering import AnswerArguments, answer_prompts
from lit_llama.command_line import run
from lit_llama.errors import InputError


@dataclass(kw_only=True)
class Arguments(AnswerArguments):
    """Let a base model with a LoRA adapter answer: one prompt, many out of a file, standard input, or what you type."""

    adapter_dir: Path | None = None
    """Adapter to put on the base, as pretrain/lora.py or PEFT writes it."""
    adapters_dir: Path | None = None
    """Instead of it a folder with several, one a subfolder: an expert for each prompt."""
    route: str = "auto"
    """Which of them answers: the one of this name, or, for each prompt, the one that route_by says."""
    route_by: Method = "embedding"
    """embedding: whose documents are nearest to the prompt (scripts/describe_expert.py). arrow: each token mixes those
    whose updates act on it most; nothing to prepare. gates: each token mixes those whose gates open
    (scripts/train_gates.py)."""


def main(arguments: Arguments) -> None:
    if (arguments.adapter_dir is None) == (arguments.adapters_dir is None):
        raise InputError("give --adapter_dir, one adapter, or --adapters_dir, a folder of them to choose from")
    answer_prompts(arguments, arguments.adapter_dir, arguments.adapters_dir, arguments.route, arguments.route_by)


if __name__ == "__main__":
    run(main)
