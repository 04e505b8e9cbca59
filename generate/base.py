"""Let a base model answer.

python generate/base.py --checkpoint_dir checkpoints/smollm2-135m-instruct --prompt "What is the capital of Norway?"
"""

from lit_llama.answering import AnswerArguments, answer_prompts
from lit_llama.command_line import run


def main(arguments: AnswerArguments) -> None:
    answer_prompts(arguments)


if __name__ == "__main__":
    run(main)
