"""Talk with a model and its experts in the terminal.

python generate/chat.py --checkpoint_dir checkpoints/smollm2-135m-instruct --adapter_dir out/my_domain
"""

from lit_llama.command_line import run
from lit_llama.generation_arguments import ChatArguments


def main(arguments: ChatArguments) -> None:
    from lit_llama.chat import Chat, converse  # with torch, which --help can do without

    converse(Chat(arguments))


if __name__ == "__main__":
    run(main)
