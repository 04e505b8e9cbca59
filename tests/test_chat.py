"""generate/chat.py: the same answers as generate/lora.py gives, with history, switching, comparing and saving."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_script, write_adapters

from lit_llama.chat import Chat, ChatArguments, wrapped
from lit_llama.checkpoint import load_model
from lit_llama.errors import InputError
from lit_llama.generation import answer_questions
from lit_llama.lora import load_adapter
from lit_llama.tokenizer import Tokenizer

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def experts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tiny_checkpoint, tmp_path_factory.mktemp("experts"), "law", "tax")


@pytest.fixture
def chat(tiny_checkpoint: Path, experts: Path) -> Chat:
    return Chat(
        ChatArguments(
            checkpoint_dir=tiny_checkpoint, adapters_dir=experts, dtype="fp32", device="cpu", max_new_tokens=8
        )
    )


def expected(checkpoint: Path, adapter_dir: Path | None, conversation: object) -> str:
    model = load_model(checkpoint, torch.float32).eval()
    if adapter_dir is not None:
        load_adapter(model, adapter_dir)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    return answer_questions(model, tokenizer, [conversation], "chatml", max_new_tokens=8)[0]


def test_answers_follow_the_history_and_the_expert(
    chat: Chat, tiny_checkpoint: Path, experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[dict[str, str]] = []
    for line, expert in (
        ("Who pays?", "law"),
        ("/expert tax", None),
        ("And when?", "tax"),
        ("/expert base", None),
        ("Why?", None),
    ):
        assert chat.respond(line)
        answer = capsys.readouterr().out.strip()
        if line.startswith("/"):
            assert not answer
            continue
        said.append({"role": "user", "content": line})
        assert answer == expected(tiny_checkpoint, expert and experts / expert, said)
        said.append({"role": "assistant", "content": answer})
    assert chat.messages == said
    chat.respond("/undo")
    assert chat.messages == said[:-2]
    # What was said before is not read again: no more than the last answer, whose tokens may be cut otherwise, and this.
    chat.respond("/expert tax"), chat.respond("/new"), chat.respond("Who pays, and for whom does the law say so?")
    read = chat.engine.speed.prompt_tokens
    chat.respond("Why?")
    assert read > 30 and chat.engine.speed.prompt_tokens < 35
    chat.respond("/new")
    assert chat.messages == []


def test_the_base_and_the_expert_side_by_side(
    chat: Chat,
    tiny_checkpoint: Path,
    experts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [
        expected(tiny_checkpoint, directory, [{"role": "user", "content": "Who pays?"}])
        for directory in (None, experts / "law")
    ]
    assert answers[0] != answers[1]
    monkeypatch.setenv("COLUMNS", "101")
    chat.respond("/compare Who pays?")
    lines = [line.ljust(101) for line in capsys.readouterr().out.splitlines()]
    columns = [[line[:49].rstrip() for line in lines], [line[51:].strip() for line in lines]]
    for title, answer, column in zip(("base", "law"), answers, columns, strict=True):
        assert column[0] == title
        assert " ".join(" ".join(column[2:]).split()) == " ".join(answer.split())
    assert chat.messages == []
    monkeypatch.setenv("COLUMNS", "40")
    chat.respond("/compare Who pays?")
    assert capsys.readouterr().out.strip() == f"base:\n{answers[0]}\n\nlaw:\n{answers[1]}".strip()


def test_what_is_wrong_is_said_and_changes_nothing(chat: Chat, tmp_path: Path) -> None:
    for line, message in (
        ("/expert nobody", "there are base, law, tax"),
        ("/dance", "not a command"),
        ("/compare", "nothing was asked|Nothing was asked"),
        ("/save", "no file was named"),
        (f"/save {tmp_path / 'a.jsonl'}", "nothing was said"),
        ("word " * 600, "tokens"),
    ):
        with pytest.raises(InputError, match=message):
            chat.respond(line)
    assert chat.expert == "law" and chat.messages == []
    chat.respond("/expert base")
    with pytest.raises(InputError, match="needs an expert"):
        chat.respond("/compare Who?")
    assert chat.respond("") and not chat.respond("/quit")


def test_old_turns_give_way_to_the_context(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        chat.respond("word " * 60)
    assert "are too long ago" in capsys.readouterr().err
    assert len(chat.messages) == 6


def test_as_a_script(tiny_checkpoint: Path, experts: Path, tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    lines = ["/help", "/experts", "/system Be brief.", "Who pays?", f"/save {path}", "/nonsense", "/quit", "never read"]
    arguments = ["generate/chat.py", "--checkpoint_dir", tiny_checkpoint, "--adapter_dir", experts / "law"]
    arguments += ["--dtype", "fp32", "--device", "cpu", "--max_new_tokens", 8]
    done = run_script(*arguments, input="\n".join(lines), env=ONE_THREAD)
    (conversation,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert [message["role"] for message in conversation["messages"]] == ["system", "user", "assistant"]
    assert done.stdout.strip() == conversation["messages"][2]["content"]
    assert done.stdout.strip() == expected(tiny_checkpoint, experts / "law", conversation["messages"][:2])
    assert "base, [law]" in done.stderr and "error: /nonsense is not a command" in done.stderr
    done = run_script(*arguments, "--adapters_dir", experts, input="", env=ONE_THREAD, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_lines_are_wrapped_and_kept_apart() -> None:
    assert wrapped("one two three\n\nfour", 7) == ["one two", "three", "", "four"]
