"""From instruction files to an instruction store: conversations rendered in a prompt style, with what is to be learned.

An instruction store is a token store with one whole conversation a document and a loss mask that is 1 on what the
assistant says and on the token that ends it. Its `meta.json` has `"examples": true`, `"style"` and `"system"` besides;
`train_questions.jsonl` and `val_questions.jsonl` beside it ask for the last answer of each conversation: {"id",
"question", "answers", "messages"?}, where "messages" is all that was said before, if that is more than the question.
The command is `scripts/prepare_instructions.py`; reading the files is `conversations`'s.
"""

import hashlib
import json
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np

from lit_llama.command_line import StatusLine, progress
from lit_llama.config import LlamaConfig
from lit_llama.data.conversations import KEYS, BadRow, Conversation, read_conversations
from lit_llama.data.deduplication import text_digest
from lit_llama.data.token_store import TokenStoreWriter, refuse_store_overwrite
from lit_llama.errors import InputError
from lit_llama.files import write_json
from lit_llama.prompts import STYLES, Message, content_with_input, detect_style, encode_example, with_system
from lit_llama.tokenizer import Tokenizer

NAMED_ROWS = 100
"""How many rows of a kind a report names; it counts all."""


@dataclass(frozen=True)
class InstructionOptions:
    """How conversations become examples.

    Args:
        checkpoint_dir: The model to be trained; its tokenizer and chat template are used.
        style: Prompt style; None for the checkpoint's own, or where it has none, plain if the first row is a prompt and
            its completion, else alpaca.
        system: System message of conversations that have none; None: the style's own default.
        learn_prompts: Learn every token, not only the answers.
        max_length: Most tokens of an example; None: the model's context.
        too_long: Whether longer examples are dropped, cut at the end, or end the run. What is cut off is not learned,
            the end of the answer among it; an example that has no learned token left is dropped.
        bad_rows: Whether rows that give no conversation end the run or are skipped.
        columns: What the files call their columns; see `conversations.read_conversations`.
    """

    checkpoint_dir: Path
    style: str | None = None
    system: str | None = None
    learn_prompts: bool = False
    max_length: int | None = None
    too_long: Literal["drop", "cut", "error"] = "drop"
    bad_rows: Literal["error", "skip"] = "error"
    columns: Mapping[str, str] = field(default_factory=dict)


class Example(NamedTuple):
    """A conversation, its ids, and which of them are learned."""

    conversation: Conversation
    ids: list[int]
    mask: list[int]

    @property
    def first_turn(self) -> bytes:
        """16 bytes that are equal where the user begins with the same words."""
        first = next(message for message in self.conversation.messages if message["role"] == "user")
        return text_digest(content_with_input(first))


@dataclass
class _SplitCounts:
    lengths: array = field(default_factory=lambda: array("q"))
    learned_tokens: int = 0
    answers: int = 0
    learned_answers: int = 0
    multi_turn: int = 0

    def add(self, example: Example) -> None:
        answers = sum(message["role"] == "assistant" for message in example.conversation.messages)
        self.lengths.append(len(example.ids))
        self.learned_tokens += sum(example.mask)
        self.answers += answers
        self.learned_answers += sum(after > before for before, after in pairwise([0, *example.mask]))
        self.multi_turn += answers > 1

    def as_json(self) -> dict[str, Any]:
        p50, p95 = np.percentile(self.lengths, [50, 95], method="higher")
        return {
            "examples": len(self.lengths),
            "tokens": sum(self.lengths),
            "learned_tokens": self.learned_tokens,
            "tokens_per_example": {"p50": int(p50), "p95": int(p95), "max": max(self.lengths)},
            "answers": self.answers,
            "learned_answers": self.learned_answers,
            "multi_turn": self.multi_turn,
        }


class ExampleReader:
    """Reads files as examples, one at a time, and keeps count of what became none.

    Attributes:
        style: the prompt style.
        max_length: most tokens of an example.
    """

    def __init__(self, tokenizer: Tokenizer, options: InstructionOptions, first_source: Path) -> None:
        unknown = options.columns.keys() - {*KEYS, "system"}
        if unknown:
            raise InputError(f"--columns: {min(unknown)!r} is none of {', '.join(KEYS)}, system")
        self.tokenizer, self.options = tokenizer, options
        self.style = options.style or self._default_style(first_source)
        if self.style not in STYLES:
            raise InputError(f"--style {self.style!r} is not one of {', '.join(STYLES)}")
        probe = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
        encode_example(tokenizer, self.style, with_system(tokenizer, self.style, probe, options.system))
        context = LlamaConfig.from_json(options.checkpoint_dir).max_position_embeddings
        self.max_length = context if options.max_length is None else options.max_length
        if not 2 <= self.max_length <= context:
            raise InputError(f"--max_length {self.max_length}: must be 2 to {context}, the context of the model")
        self.forms: dict[str, Counter[str]] = {}
        self.bad: list[BadRow] = []
        self.too_long: list[str] = []
        self.num_bad = self.num_too_long = self.num_emptied = self.unanswered = self.duplicates = 0
        self._seen: set[bytes] = set()

    def _default_style(self, first_source: Path) -> str:
        if self.tokenizer.chat_template is not None:
            return detect_style(self.options.checkpoint_dir)
        rows = read_conversations(first_source, self.options.columns)
        first = next((row.form for row in rows if isinstance(row, Conversation)), None)
        return "plain" if first == "prompt/completion" else "alpaca"

    def read(self, sources: Sequence[Path]) -> Iterator[Example]:
        """Examples of the files in order, without exact copies of earlier ones.

        Raises:
            InputError: a file that cannot be read, or with `too_long` "error" an example that is.
        """
        for path in sources:
            forms = self.forms.setdefault(str(path), Counter())
            for row in read_conversations(path, self.options.columns):
                if isinstance(row, BadRow):
                    self._note_bad(row)
                    continue
                try:
                    example = self._encode(row)
                except InputError as error:
                    self._note_bad(BadRow(row.place, str(error)))
                    continue
                digest = hashlib.blake2b(json.dumps(row.messages).encode(), digest_size=16).digest()
                if digest in self._seen:
                    self.duplicates += 1
                    continue
                self._seen.add(digest)
                forms[row.form] += 1
                self.unanswered += row.unanswered
                fitting = self._fit(example)
                if fitting is not None:
                    yield fitting

    def check_bad_rows(self) -> None:
        """Raise InputError, naming the first bad row and their number, unless they are to be skipped."""
        if self.bad and self.options.bad_rows == "error":
            place, reason = self.bad[0]
            others = f" (one of {self.num_bad} bad rows)" if self.num_bad > 1 else ""
            raise InputError(f"{place}: {reason}{others}; correct it, or pass --bad_rows skip to leave such rows out")

    def _note_bad(self, row: BadRow) -> None:
        self.num_bad += 1
        self.bad = [*self.bad, row][:NAMED_ROWS]

    def _encode(self, conversation: Conversation) -> Example:
        messages = with_system(self.tokenizer, self.style, conversation.messages, self.options.system)
        return Example(conversation, *encode_example(self.tokenizer, self.style, messages))

    def _fit(self, example: Example) -> Example | None:
        if len(example.ids) <= self.max_length:
            return example
        if self.options.too_long == "error":
            raise InputError(
                f"{example.conversation.place}: {len(example.ids)} tokens, more than --max_length {self.max_length};"
                " shorten it, or pass --too_long drop or cut"
            )
        self.num_too_long += 1
        self.too_long = [*self.too_long, example.conversation.name][:NAMED_ROWS]
        mask = example.mask[: self.max_length]
        self.num_emptied += not any(mask)
        if self.options.too_long == "drop" or not any(mask):
            return None
        return example._replace(ids=example.ids[: self.max_length], mask=mask)

    def as_json(self) -> dict[str, Any]:
        """What the rows were, and what became of those that gave no example."""
        dropped = self.num_too_long if self.options.too_long == "drop" else self.num_emptied
        return {
            "forms": self.forms,
            "duplicates": self.duplicates,
            "unanswered_turns_left_out": self.unanswered,
            "too_long": {
                "max_length": self.max_length,
                "dropped": dropped,
                "cut": self.num_too_long - dropped,
                "rows": self.too_long,
            },
            "bad_rows": {"skipped": self.num_bad, "rows": [": ".join(row) for row in self.bad]},
        }


class _Splitter:
    """Sends examples to train or val by a hash of the user's first turn, so that no prompt lies in both.

    The prompt of the smallest hash goes to val and that of the largest to train whatever the fraction, so that no split
    stays empty; the examples of these two are held back to the end.
    """

    def __init__(self, write: Callable[[str, Example], None], val_fraction: float, seed: int) -> None:
        self._write, self._val_fraction, self._seed = write, val_fraction, seed.to_bytes(8, "little")
        self._held: dict[float, list[Example]] = {}

    def add(self, example: Example) -> None:
        digest = hashlib.blake2b(self._seed + example.first_turn, digest_size=8).digest()
        self._held.setdefault(int.from_bytes(digest, "little") / 2**64, []).append(example)
        if len(self._held) > 2:
            middle = sorted(self._held)[1]
            self._release("val" if middle < self._val_fraction else "train", middle)

    def finish(self) -> None:
        if len(self._held) == 1 and self._val_fraction > 0:
            (example, *_) = next(iter(self._held.values()))
            raise InputError(
                f"one prompt only ({example.conversation.name}), which cannot be split into train and val: pass"
                " --val_fraction 0"
            )
        for split, place in zip(("val", "train"), sorted(self._held), strict=False):
            self._release(split if self._val_fraction > 0 else "train", place)

    def _release(self, split: str, place: float) -> None:
        for example in self._held.pop(place):
            self._write(split, example)


def prepare_instructions(
    sources: list[Path],
    data_dir: Path,
    options: InstructionOptions,
    *,
    val_sources: list[Path] | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    show: int = 0,
    overwrite: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Make an instruction store of files. Returns the report that is `data_dir/report.json` too.

    Args:
        sources: Files of conversations.
        data_dir: The store to be.
        options: How conversations become examples.
        val_sources: Files that make the split "val"; all of `sources` is "train" then, except prompts of these.
        val_fraction: Share of prompts held out as split "val" without `val_sources`, 0 <= share < 1.
        seed: Of the choice of held-out prompts.
        show: Print the first examples to stderr.
        overwrite: Replace an existing store.
        command: The command line, for the record.

    Raises:
        InputError: an argument out of range, a file that cannot be read, bad rows that are not to be skipped, a style
            that the tokenizer has no tokens for, or nothing left to write.
    """
    if not 0 <= val_fraction < 1:
        raise InputError(f"--val_fraction {val_fraction}: must be at least 0 and below 1")
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed {seed}: must be 0 or more")
    refuse_store_overwrite(data_dir, overwrite)
    all_sources = [*(val_sources or []), *sources]
    began = time.monotonic()
    tokenizer = Tokenizer.from_checkpoint(options.checkpoint_dir)
    reader = _announced_reader(tokenizer, options, all_sources[0])
    counts: dict[str, _SplitCounts] = {}
    status = StatusLine()
    with (
        TokenStoreWriter(
            data_dir,
            tokenizer.vocab_size,
            tokenizer.sha256,
            str(options.checkpoint_dir),
            sources=map(str, all_sources),
            command=command,
            overwrite=overwrite,
            extra={"examples": True, "style": reader.style, "system": options.system},
        ) as writer,
        ExitStack() as stack,
    ):
        questions: dict[str, TextIO] = {}

        def write(split: str, example: Example) -> None:
            if split not in questions:
                path = writer.directory / f"{split}_questions.jsonl"
                questions[split] = stack.enter_context(open(path, "w", encoding="utf-8"))
            number = counts.setdefault(split, _SplitCounts())
            json.dump(_question(example.conversation, len(number.lengths)), questions[split], ensure_ascii=False)
            questions[split].write("\n")
            text = tokenizer.decode(example.ids)
            mask = None if options.learn_prompts else example.mask
            writer.add(split, example.ids, mask, num_words=len(text.split()), num_bytes=len(text.encode()))
            number.add(example)

        splitter = _Splitter(write, val_fraction, seed)
        held_out: set[bytes] = set()
        shown = already_held_out = 0
        for split, paths in [("val", val_sources), ("train", sources)] if val_sources else [(None, sources)]:
            for number, example in enumerate(reader.read(paths), start=1):
                if shown < show:
                    shown += 1
                    progress(describe_example(tokenizer, example, options.learn_prompts))
                if split is None:
                    splitter.add(example)
                elif split == "train" and example.first_turn in held_out:
                    already_held_out += 1
                else:
                    held_out.update([example.first_turn] if split == "val" else [])
                    write(split, example)
                if number % 500 == 0:
                    status.show(f"{number:,} examples of {split or 'all'}")
            if split is not None and split not in counts:
                reader.check_bad_rows()
                raise InputError(f"no example for {split} in {', '.join(map(str, paths))}; nothing was written")
        status.clear()
        reader.check_bad_rows()
        splitter.finish()
        if not counts:
            left_out = f"{reader.num_bad} bad, {reader.num_too_long} too long"
            raise InputError(f"no example in {', '.join(map(str, sources))} ({left_out}); nothing was written")
        report = {
            "style": reader.style,
            "system": options.system,
            "learn_prompts": options.learn_prompts,
            "splits": {split: counts[split].as_json() for split in sorted(counts)},
            **reader.as_json(),
            "prompts_of_val_left_out": already_held_out,
            "seconds": round(time.monotonic() - began, 1),
        }
        write_json(writer.directory / "report.json", report)
    for file, forms in reader.forms.items():
        progress(f"{file}: {', '.join(f'{count:,} {form}' for form, count in forms.items()) or 'no example'}")
    return report


def preview_instructions(sources: list[Path], options: InstructionOptions, show: int) -> None:
    """Print the first examples of the files to stderr; arguments and errors as `prepare_instructions`."""
    tokenizer = Tokenizer.from_checkpoint(options.checkpoint_dir)
    reader = _announced_reader(tokenizer, options, sources[0])
    shown = 0
    for example in reader.read(sources):
        progress(describe_example(tokenizer, example, options.learn_prompts))
        shown += 1
        if shown == show:
            break
    reader.check_bad_rows()
    if not shown:
        raise InputError(f"no example in {', '.join(map(str, sources))} of at most {reader.max_length} tokens")


def describe_example(tokenizer: Tokenizer, example: Example, learn_prompts: bool, color: bool | None = None) -> str:
    """The exact text of an example, control tokens included; what is learned is green, or lies within ⟦ ⟧.

    Args:
        learn_prompts: all of it is.
        color: None: where stderr is a terminal.
    """
    before, after = ("\033[32m", "\033[0m") if (sys.stderr.isatty() if color is None else color) else ("⟦", "⟧")
    mask = [1] * len(example.ids) if learn_prompts else example.mask
    heading = f"--- {example.conversation.name}: {len(example.ids)} tokens, {sum(mask)} learned"
    parts = []
    for learned, group in groupby(zip(mask, example.ids, strict=True), key=itemgetter(0)):
        spelled = [(tokenizer.special_text(i) or "").encode() or tokenizer.bytes_of(i) for _, i in group]
        text = b"".join(spelled).decode(errors="replace")
        parts.append(f"{before}{text}{after}" if learned else text)
    return "\n".join([heading, "".join(parts)])


def _announced_reader(tokenizer: Tokenizer, options: InstructionOptions, first_source: Path) -> ExampleReader:
    reader = ExampleReader(tokenizer, options, first_source)
    if options.style is None:
        why = "the checkpoint's own" if tokenizer.chat_template else "the checkpoint has no chat template"
        progress(f"prompt style: {reader.style} ({why})")
    return reader


def _question(conversation: Conversation, number: int) -> dict[str, Any]:
    """A row of a question file that asks for the last answer."""
    before = conversation.messages[:-1]
    answers = [answer.strip() for answer in conversation.answers]
    row = {"id": f"{number}:{conversation.name}", "question": content_with_input(before[-1]), "answers": answers}
    return row if _is_plain(before) else row | {"messages": before}


def _is_plain(messages: Sequence[Message]) -> bool:
    return len(messages) == 1 and "input" not in messages[0]
