"""Let a base model answer.

python generate/base.py --checkpoint_dir checkpoints/smollm2-135m-instruct --prompt "What is the capital of Norway?"
"""

from lit_llama.command_line import run
from lit_llama.generation_arguments import AnswerArguments


def main(arguments: AnswerArguments) -> None:
    from lit_llama.answering import answer_prompts  # with torch, which --help can do without

    answer_prompts(arguments)


if __name__ == "__main__":
    run(main)
