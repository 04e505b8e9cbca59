"""Serve a model and its experts over HTTP, as OpenAI's API, with a page to ask them side by side.

python generate/serve.py --checkpoint_dir checkpoints/smollm2-135m-instruct --adapters_dir out/experts --port 8000
"""

from lit_llama.command_line import run
from lit_llama.generation_arguments import ServeArguments


def main(arguments: ServeArguments) -> None:
    from lit_llama.server import serve  # with torch, which --help can do without

    serve(arguments)


if __name__ == "__main__":
    run(main)
