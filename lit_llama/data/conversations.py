"""Instruction files -> conversations: JSON lines, JSON, CSV, TSV and Parquet, in the forms that data sets come in.

A row becomes a `Conversation` that ends with an answer, or a `BadRow` that says why it does not. Forms are told by the
row's keys, so that one file may mix them. Making tokens out of conversations is `instructions`'s.
"""

import codecs
import csv
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lit_llama.data.extraction import Unusable
from lit_llama.errors import InputError
from lit_llama.prompts import Message

PAIRS = (
    ("alpaca", "instruction", "input", "output"),
    ("dolly", "instruction", "context", "response"),
    ("prompt/completion", "prompt", None, "completion"),
    ("question/answer", "question", "context", "answer"),
    ("question/answers", "question", "context", "answers"),
)
"""Forms of one question and one answer: name, key of what is asked, of what comes with it, of the answer."""
CONVERSATIONS = (("openai", "messages", "role", "content"), ("sharegpt", "conversations", "from", "value"))
"""Forms of a whole conversation: name, key of its turns, key of a turn's speaker, of what is said."""
KEYS = tuple(dict.fromkeys([key for _, *keys in PAIRS for key in keys if key] + [row[1] for row in CONVERSATIONS]))
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
PARQUET_ROWS = 256


class Conversation(NamedTuple):
    """Turns that end with an answer.

    `name` is file#row, `place` the same for messages ("dir/data.jsonl, line 3"), `answers` what is accepted as the last
    answer (the first of them is in `messages`), `unanswered` the number of turns after it, which were left out.
    """

    name: str
    place: str
    form: str
    messages: list[Message]
    answers: list[str]
    unanswered: int


class BadRow(NamedTuple):
    """A row that gives no conversation, where it is ("data.jsonl, line 3"), and why."""

    place: str
    reason: str


def read_conversations(path: Path, columns: Mapping[str, str]) -> Iterator[Conversation | BadRow]:
    """The rows of a file, in order, read as they are asked for (a JSON array at once).

    Args:
        columns: what the file calls one of `KEYS` or "system", {"instruction": "Frage"}.

    Raises:
        InputError: no such file, an unknown suffix, or a file that is broken as a whole.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'a folder; name the files in it' if path.is_dir() else 'no such file'}")
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv}
    reader = (readers | {".parquet": _parquet}).get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: unknown suffix {path.suffix!r}; jsonl, ndjson, json, csv, tsv and parquet are read")
    for unit, number, row in reader(path):
        place = f"{path}, {unit} {number}"
        try:
            if isinstance(row, Unusable):
                raise row
            if not isinstance(row, dict):
                raise Unusable("not a JSON object")
            yield _conversation(f"{path.name}#{number}", place, row, columns)
        except Unusable as error:
            yield BadRow(place, str(error))


def _conversation(name: str, place: str, row: dict[str, Any], columns: Mapping[str, str]) -> Conversation:
    for key, theirs in columns.items():
        if theirs in row:
            row = row | {key: row[theirs]}
    present = {key for key, value in row.items() if value is not None}
    whole = next((found for found in CONVERSATIONS if found[1] in present), None)
    form, messages = (whole[0], _turns(row, *whole[1:])) if whole else _pair(row, present)
    answers = row["answers"] if form == "question/answers" else None
    if "system" in present and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(row["system"], "system")}, *messages]
    if messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    total = len(messages)
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    _check_turns(messages)
    return Conversation(name, place, form, messages, answers or [messages[-1]["content"]], total - len(messages))


def _pair(row: dict[str, Any], present: set[str]) -> tuple[str, list[Message]]:
    found = next((keys for keys in PAIRS if keys[1] in present and keys[3] in row), None)
    if found is None:
        pairs = ", ".join(f"{asked} and {answer}" for _, asked, _, answer in PAIRS)
        raise Unusable(f"no keys of a known form ({pairs}, messages, or conversations) among {', '.join(row)}")
    form, asked, given, answer = found
    output = row[answer]
    if form == "question/answers":
        if (
            not isinstance(output, list)
            or not output
            or not all(isinstance(text, str) and text.strip() for text in output)
        ):
            raise Unusable("'answers' is not a list of texts")
        output = output[0]
    question = {"role": "user", "content": _text(row[asked], asked)}
    if given in present and _text(row[given], given).strip():
        question["input"] = row[given]
    if not (_text(output, answer) if output is not None else "").strip():
        raise Unusable(f"'{answer}' is empty")
    return form, [question, {"role": "assistant", "content": output}]


def _turns(row: dict[str, Any], key: str, speaker: str, said: str) -> list[Message]:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise Unusable(f"'{key}' is not a list of turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise Unusable(f"turn {number} is not an object with '{speaker}' and '{said}'")
        role = turn.get(speaker, turn.get("role"))
        if role not in ROLES:
            raise Unusable(f"turn {number}: '{speaker}' is {role!r}, none of {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": _text(turn.get(said, turn.get("content")), f"turn {number}")})
    return messages


def _check_turns(messages: list[Message]) -> None:
    if not messages:
        raise Unusable("no turn of the assistant: nothing to learn")
    for number, message in enumerate(messages, start=1):
        if not (message["content"].strip() or message.get("input")):
            raise Unusable(f"turn {number} ({message['role']}) is empty")
        if message["role"] == "system" and number > 1:
            raise Unusable(f"turn {number}: a system message can only be the first")
    if messages[messages[0]["role"] == "system"]["role"] == "assistant":
        raise Unusable("the conversation starts with the assistant; a user's turn must come first")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"{name!r} is {type(value).__name__}, not text")
    return value


def _json_lines(path: Path) -> Iterator[tuple[str, int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                row: Any = json.loads(line.decode())
            except UnicodeDecodeError as error:
                row = Unusable(f"not UTF-8 text (byte {line[error.start]:#04x} at {error.start})")
            except (ValueError, RecursionError) as error:
                row = Unusable(f"not JSON ({error})")
            yield "line", number, row


def _json(path: Path) -> Iterator[tuple[str, int, Any]]:
    with open(path, "rb") as file:
        start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] != b"[":  # JSON lines under another name
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    yield from (("row", number, row) for number, row in enumerate(rows, start=1))


def _csv(path: Path) -> Iterator[tuple[str, int, Any]]:
    csv.field_size_limit(2**31 - 1)  # the library refuses fields of more than 128 KiB otherwise
    line = 0
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for number, row in enumerate(reader, start=1):
                line = reader.line_num
                yield "row", number, Unusable("more fields than the header has") if None in row else row
        except UnicodeDecodeError as error:
            raise InputError(f"{path}, after line {line}: not UTF-8 text ({error.reason})") from None
        except csv.Error as error:
            raise InputError(f"{path}, after line {line}: not valid {path.suffix[1:].upper()} ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[str, int, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow; pip install 'lit-llama[documents]'") from None
    number = 0
    try:
        with ParquetFile(path) as table:
            batches = table.iter_batches(batch_size=PARQUET_ROWS)
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1):
                yield "row", number, row
    except (ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}, after row {number}: not readable as Parquet ({error})") from None
