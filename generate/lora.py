"""Let a model with a LoRA adapter, or with the one of several that suits a prompt, answer.

python generate/lora.py --checkpoint_dir checkpoints/smollm2-135m-instruct --adapter_dir out/my_domain --prompt "What is
the capital of Norway?"
"""

from lit_llama.command_line import run
from lit_llama.errors import InputError
from lit_llama.generation_arguments import ExpertArguments


def main(arguments: ExpertArguments) -> None:
    if (arguments.adapter_dir is None) == (arguments.adapters_dir is None):
        raise InputError("give --adapter_dir, one adapter, or --adapters_dir, a folder of them to choose from")
    from lit_llama.answering import answer_prompts  # with torch, which --help can do without

    answer_prompts(arguments, arguments.adapter_dir, arguments.adapters_dir, arguments.route, arguments.route_by)


if __name__ == "__main__":
    run(main)
