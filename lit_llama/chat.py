"""A conversation in the terminal with a base model and its experts: history, commands, two answers side by side.

What the model says goes to stdout, everything else to stderr. How an answer comes about is `batching.py`, how a
conversation is dressed `prompts.py`, how experts share a base `adapters.py`.
"""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from lit_llama.answering import BASE, load_experts, load_for_generation, open_engine, style_and_system
from lit_llama.batching import Request
from lit_llama.command_line import progress
from lit_llama.errors import InputError
from lit_llama.files import atomic_file, refuse_overwrite
from lit_llama.generation import Speed, encode_question
from lit_llama.generation_arguments import ChatArguments
from lit_llama.prompts import Message, stop_strings

HELP = """/expert NAME    who answers from now on ("base": the model without an adapter)
/experts        who there is
/compare [TEXT] the base and the expert side by side, on TEXT or your last question alone
/system [TEXT]  another system message, or none; begins a new conversation
/undo           take back your last question and its answer
/new            begin a new conversation
/save FILE      the conversation as JSONL, as finetuning reads it
/quit           leave, as Ctrl-D does; Ctrl-C ends an answer"""


class Chat:
    """One conversation, and who answers in it."""

    def __init__(self, arguments: ChatArguments) -> None:
        style_and_system(arguments, arguments.adapter_dir)  # what is wrong with them is said before the model is loaded
        self.arguments = arguments
        self.directories: dict[str, Path] = {}
        self.model, self.tokenizer = load_for_generation(
            arguments,
            lambda model, _: self.directories.update(
                load_experts(model, arguments.adapter_dir, arguments.adapters_dir)
            ),
        )
        # Room for the conversation beside what /compare asks: a question goes on behind what was read of it.
        self.engine = open_engine(arguments, self.model, self.tokenizer, slots=3)
        self.expert = next(iter(self.directories), BASE)
        self.system = arguments.system
        self.messages: list[Message] = []
        self.turn = 0

    def respond(self, line: str) -> bool:
        """Do what a line says, or answer it; false when it ends the conversation.

        Raises:
            InputError: no such command or expert, or a question that does not fit into the context.
        """
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match command:
            case "":
                pass
            case "/quit" | "/exit":
                return False
            case "/help":
                progress(HELP)
            case "/experts":
                progress(", ".join(f"[{name}]" if name == self.expert else name for name in (BASE, *self.directories)))
            case "/expert":
                self._choose(rest)
            case "/compare":
                self._compare(rest)
            case "/system":
                self.system, self.messages = rest, []
                progress("a new conversation")
            case "/new":
                self.messages = []
                progress("a new conversation")
            case "/undo":
                del self.messages[-2:]
                progress(f"the conversation has {len(self.messages) // 2} questions")
            case "/save":
                self._save(rest)
            case _ if command.startswith("/"):
                raise InputError(f"{command} is not a command; /help lists them")
            case _:
                self._answer(line.strip())
        return True

    def _choose(self, name: str) -> None:
        if name != BASE and name not in self.directories:
            raise InputError(f"no expert is called {name!r}: there are {', '.join((BASE, *self.directories))}")
        self.expert = name
        progress(f"{name} answers")

    def _answer(self, question: str) -> None:
        """Stream an answer; what was said of it counts, even if Ctrl-C ends it."""
        messages = [*self.messages, {"role": "user", "content": question}]
        answer, self.engine.speed = "", Speed()
        try:
            for _, text in self._stream([(self.expert, messages)]):
                text = text if answer else text.lstrip()
                print(text, end="", flush=True)
                answer += text
        except KeyboardInterrupt:
            pass
        print(flush=True)
        if self.engine.speed.new_tokens:
            progress(f"[{self.expert}, {self.engine.speed.decode_rate:.0f} tokens/s]")
        self.messages = [*messages, {"role": "assistant", "content": answer.strip()}]
        self.turn += 1

    def _compare(self, question: str) -> None:
        """The base's answer and the expert's in two columns, below each other on a narrow terminal."""
        if not question:
            asked = [message["content"] for message in self.messages if message["role"] == "user"]
            if not asked:
                raise InputError("/compare what? Nothing was asked yet: /compare QUESTION")
            question = asked[-1]
        if self.expert == BASE:
            raise InputError("/compare needs an expert beside the base: /expert NAME")
        messages = [{"role": "user", "content": question}]
        answers = ["", ""]
        for row, text in self._stream([(BASE, messages), (self.expert, messages)]):
            answers[row] += text
        width = shutil.get_terminal_size().columns
        titles = (BASE, self.expert)
        if width < 60:
            print("\n\n".join(f"{title}:\n{answer.strip()}" for title, answer in zip(titles, answers, strict=True)))
            return
        column = (width - 3) // 2
        left, right = (
            [title, "-" * column, *wrapped(answer, column)] for title, answer in zip(titles, answers, strict=True)
        )
        for one, other in zip_longest(left, right, fillvalue=""):
            print(f"{one:<{column}} | {other}".rstrip())

    def _stream(self, asked: list[tuple[str, list[Message]]]) -> Iterator[tuple[int, str]]:
        """Answers to conversations, a row each, by the experts named with them."""
        arguments, requests = self.arguments, []
        # Asking again draws again, and the same conversation gives the same answers.
        sampling = replace(arguments, seed=arguments.seed + self.turn)
        for expert, messages in asked:
            style, system = style_and_system(arguments, self.directories.get(expert))
            system = system if self.system is None else self.system
            prompt = self._fitting(style, system, messages)
            adapter = None if expert == BASE else expert
            requests.append(
                Request(
                    prompt=prompt,
                    max_new_tokens=arguments.max_new_tokens,
                    sampling=sampling,
                    stop=stop_strings(style),
                    adapter=adapter,
                )
            )
        for row, piece in self.engine.answer(requests):
            yield row, piece.text

    def _fitting(self, style: str, system: str | None, messages: list[Message]) -> list[int]:
        """Ids of a conversation without the oldest turns that leave no room for an answer."""
        room = self.model.config.max_position_embeddings - self.arguments.max_new_tokens
        ids = encode_question(self.tokenizer, style, messages, system)
        left_out = 0
        while len(ids) > room and len(messages) > 2:
            messages, left_out = messages[2:], left_out + 1
            ids = encode_question(self.tokenizer, style, messages, system)
        if left_out:
            progress(f"the first {left_out} questions are too long ago for the context and left out")
        return ids

    def _save(self, path: str) -> None:
        if not path or not self.messages:
            raise InputError("/save FILE: no file was named" if not path else "/save: nothing was said yet")
        refuse_overwrite(path, overwrite=False)
        system = [] if not self.system else [{"role": "system", "content": self.system}]
        with atomic_file(path) as file:
            file.write(json.dumps({"messages": [*system, *self.messages]}, ensure_ascii=False) + "\n")
        progress(f"wrote {path}")


def wrapped(text: str, width: int) -> list[str]:
    """Lines of a text, none wider than `width`; its own line breaks stay."""
    return [piece for line in text.strip().splitlines() for piece in textwrap.wrap(line, width) or [""]]


def converse(chat: Chat) -> None:
    """Ask for lines until there are no more, on a terminal with a prompt."""
    with suppress(ImportError):
        import readline  # noqa: F401  importing it gives the prompt arrow keys and a history
    terminal = sys.stdin.isatty()
    if terminal:
        progress(f"{chat.expert} answers; /help tells what else you can say")
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            if not chat.respond(input()):
                return
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        except InputError as error:
            progress(f"error: {error}")
