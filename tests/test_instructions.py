"""Instruction files of every form -> an instruction store, read back by plain numpy."""

import json
from pathlib import Path

import numpy as np
import pytest

from lit_llama.data.conversations import BadRow, Conversation, read_conversations
from lit_llama.data.instructions import InstructionOptions, prepare_instructions, preview_instructions
from lit_llama.data.token_store import TokenStore
from lit_llama.errors import InputError
from lit_llama.evaluation.questions import read_questions
from lit_llama.prompts import encode_chat, encode_example
from lit_llama.tokenizer import Tokenizer

USER, ASSISTANT = {"role": "user", "content": "Highest point?"}, {"role": "assistant", "content": "Everest"}
PAIR = [USER, ASSISTANT]
ROWS = {
    "alpaca": {"instruction": "Highest point?", "input": "", "output": "Everest"},
    "dolly": {"instruction": "Highest point?", "context": None, "response": "Everest", "category": "qa"},
    "prompt/completion": {"prompt": "Highest point?", "completion": "Everest"},
    "question/answer": {"question": "Highest point?", "answer": "Everest"},
    "question/answers": {"id": 7, "question": "Highest point?", "answers": ["Everest", "Mount Everest"]},
    "openai": {"messages": PAIR},
    "sharegpt": {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "Everest"}]},
}


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(count: int, **extra: object) -> list[dict]:
    return [{"instruction": f"What is {n} plus one?", "output": f"It is {n + 1}."} | extra for n in range(count)]


def prepare(source: Path | list[Path], checkpoint: Path, data_dir: Path, **options) -> dict:
    names = ("val_sources", "val_fraction", "seed", "show", "overwrite")
    own = {name: options.pop(name) for name in names if name in options}
    sources = source if isinstance(source, list) else [source]
    return prepare_instructions(sources, data_dir, InstructionOptions(checkpoint, **options), **own)


def stored(data_dir: Path, split: str) -> list[tuple[list[int], list[int]]]:
    """Ids and mask of each example, read with nothing but numpy."""
    tokens, mask = (
        np.fromfile(data_dir / split / "tokens.bin", "<u2"),
        np.fromfile(data_dir / split / "loss_mask.bin", "u1"),
    )
    ends = np.load(data_dir / split / "documents.npy").tolist()
    return [(tokens[a:b].tolist(), mask[a:b].tolist()) for a, b in zip(ends[:-1], ends[1:], strict=True)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("form", ROWS)
def test_every_form_in_every_format(form: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, [ROWS[form]])
    elif suffix == "json":
        path.write_text(json.dumps([ROWS[form]], indent=1), encoding="utf-8-sig")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[form]]), path)
    (row,) = read_conversations(path, {})
    assert isinstance(row, Conversation)
    assert (row.form, row.messages, row.name) == (form, PAIR, f"rows.{suffix}#1")
    assert row.answers == ROWS[form].get("answers", ["Everest"])


def test_tables_and_mapped_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'Frage,Antwort,Kontext\n"Was, ""so""?\nJa?",Doch,\nWer?,Ich,Haus\n', encoding="utf-8-sig"
    )
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\nOnce\t upon\n")
    columns = {"instruction": "Frage", "output": "Antwort", "input": "Kontext"}
    first, second = read_conversations(tmp_path / "a.csv", columns)
    assert first.messages == [
        {"role": "user", "content": 'Was, "so"?\nJa?'},
        {"role": "assistant", "content": "Doch"},
    ]
    assert second.messages[0] == {"role": "user", "content": "Wer?", "input": "Haus"}
    (row,) = read_conversations(tmp_path / "a.tsv", {})
    assert (row.form, row.messages[1]["content"]) == ("prompt/completion", " upon")


def test_roles_and_systems(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "Be."}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [
        {"conversations": [*turns, {"from": "user", "value": "unanswered"}]},
        {"system": "Be.", "messages": [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]},
        {
            "messages": [
                {"role": "developer", "content": "Be."},
                *({"role": t["from"], "content": t["value"]} for t in turns[1:]),
            ]
        },
        {"system": "", "instruction": "a", "output": "b"},
    ]
    found = list(read_conversations(write_jsonl(tmp_path / "a.jsonl", rows), {}))
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert [row.messages for row in found] == [[{"role": "system", "content": "Be."}, *expected]] * 3 + [expected]
    assert [row.unanswered for row in found] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a"}, "no keys of a known form .* among instruction"),
        ({"instruction": "a", "output": " "}, "'output' is empty"),
        ({"instruction": "a", "output": None}, "'output' is empty"),
        ({"instruction": "a", "output": 3}, "'output' is int, not text"),
        ({"instruction": " ", "output": "b"}, "turn 1 .user. is empty"),
        ({"question": "a", "answers": []}, "'answers' is not a list of texts"),
        ({"messages": "a"}, "'messages' is not a list of turns"),
        ({"messages": [ASSISTANT, USER, ASSISTANT]}, "starts with the assistant"),
        ({"messages": [USER]}, "nothing to learn"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "turn 2 .assistant. is empty"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "turn 2: 'role' is 'tool', none of user"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "'turn 2' is NoneType, not text"),
        ({"messages": [*PAIR, {"role": "system", "content": "x"}, *PAIR]}, "turn 3: a system message can only be"),
        ([1], "not a JSON object"),
    ],
)
def test_rows_that_are_no_conversation(row: object, reason: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*numbered(3), row, *numbered(5)[3:], row])
    bad = [found for found in read_conversations(path, {}) if isinstance(found, BadRow)]
    assert [found.place for found in bad] == [f"{path}, line 4", f"{path}, line 7"]
    with pytest.raises(InputError, match=rf"rows.jsonl, line 4: .*{reason}.* .one of 2 bad rows.; correct it, or pass"):
        prepare(path, tiny_checkpoint, tmp_path / "store")
    assert list(tmp_path.iterdir()) == [path]
    report = prepare(path, tiny_checkpoint, tmp_path / "store", bad_rows="skip")
    assert report["bad_rows"]["skipped"] == 2 and "line 4: " in report["bad_rows"]["rows"][0]
    assert sum(split["examples"] for split in report["splits"].values()) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"prompt": "a", "completion": "b"}\n{"prompt": "caf\xe9"}\n',
            "line 2: not UTF-8 text .byte 0xe9 at 15",
        ),
        ("a.jsonl", b'{"prompt": "a"', "line 1: not JSON"),
        ("a.jsonl", b'{"prompt": "a", "completion": "\\ud800"}', "line 1: text has a lone surrogate"),
        ("a.json", b'[{"prompt": 1},\n "caf\xe9"]', "a.json, line 2: not UTF-8"),
        ("a.json", b'[{"prompt": 1}', "not valid JSON"),
        ("a.csv", b"prompt,completion\na,b\nc,caf\xe9\n", "a.csv, after line .: not UTF-8"),
        ("a.csv", b"prompt,completion\na,b,c\n", "row 1: more fields than the header"),
        ("a.csv", b'prompt,completion\na,"b\n', "not valid CSV"),
        ("a.parquet", b"PAR1", "not readable as Parquet"),
        ("a.txt", b"text", "unknown suffix '.txt'"),
        ("a.jsonl", b"\n", "no example in .*; nothing was written"),
    ],
)
def test_broken_files_are_one_line_and_leave_nothing(
    name: str, content: bytes, message: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        prepare(tmp_path / name, tiny_checkpoint, tmp_path / "store")
    assert "\n" not in str(raised.value) and [path.name for path in tmp_path.iterdir()] == [name]


def test_the_store_holds_each_conversation_and_what_is_learned(tmp_path: Path, tiny_checkpoint: Path) -> None:
    turns = [*PAIR, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes. <|im_end|>"}]
    own_system = [{"role": "system", "content": "Own."}, *PAIR]
    with_input = {"instruction": "Capital?", "input": "Norway", "output": "Oslo"}
    rows = [{"messages": turns}, {"messages": own_system}, with_input, ROWS["question/answers"], {"messages": turns}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = prepare(path, tiny_checkpoint, tmp_path / "store", val_fraction=0, system="Be brief.")
    tokenizer = Tokenizer.from_checkpoint(tiny_checkpoint)
    system = {"role": "system", "content": "Be brief."}
    capital = [{"role": "user", "content": "Capital?\n\nNorway"}, {"role": "assistant", "content": "Oslo"}]
    conversations = [[system, *turns], own_system, [system, *capital], [system, *PAIR]]
    expected = [encode_example(tokenizer, "chatml", messages) for messages in conversations]
    assert sorted(stored(tmp_path / "store", "train")) == sorted(expected)

    store = TokenStore.open(tmp_path / "store", "train", tokenizer.sha256)
    assert (store.meta["examples"], store.meta["style"], store.meta["system"]) == (True, "chatml", "Be brief.")
    assert store.num_bytes == sum(len(tokenizer.decode(ids).encode()) for ids, _ in expected)
    counts = report["splits"]["train"]
    lengths = sorted(len(ids) for ids, _ in expected)
    assert counts["tokens_per_example"] == {"p50": lengths[2], "p95": lengths[3], "max": lengths[3]}
    assert counts["learned_tokens"] == sum(sum(mask) for _, mask in expected)
    assert (counts["examples"], counts["answers"], counts["learned_answers"], counts["multi_turn"]) == (4, 5, 5, 1)
    assert report["duplicates"] == 1
    assert report["forms"] == {str(path): {"openai": 2, "alpaca": 1, "question/answers": 1}}
    assert report == json.loads((tmp_path / "store/report.json").read_text())

    questions = {row["question"]: row for row in read_questions(tmp_path / "store/train_questions.jsonl")}
    assert questions["Sure?"]["messages"] == turns[:-1] and questions["Sure?"]["answers"] == ["Yes. <|im_end|>"]
    assert questions["Capital?\n\nNorway"]["messages"] == [{"role": "user", "content": "Capital?", "input": "Norway"}]
    asked = [
        row for row in read_questions(tmp_path / "store/train_questions.jsonl") if row["question"] == "Highest point?"
    ]
    assert {"messages" in row for row in asked} == {True, False}
    assert ["Everest", "Mount Everest"] in [row["answers"] for row in asked]


def test_learned_prompts(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(4))
    prepare(path, tiny_checkpoint, tmp_path / "store", learn_prompts=True)
    assert TokenStore.open(tmp_path / "store", "train").loss_mask is None


def test_one_prompt_never_lies_in_both_splits(tmp_path: Path, tiny_checkpoint: Path) -> None:
    rows = [{"instruction": f"Say {n % 40}  again.", "output": f"No {n}."} for n in range(120)]
    rows += [
        {"messages": [{"role": "user", "content": f"Say {n} again."}, ASSISTANT, USER, ASSISTANT]} for n in range(40)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = prepare(path, tiny_checkpoint, tmp_path / "one", val_fraction=0.25)
    counts = {split: entry["examples"] for split, entry in report["splits"].items()}
    assert sum(counts.values()) == 160 and counts["val"] % 4 == 0 and 12 <= counts["val"] <= 80

    def prompts(data_dir: Path, split: str) -> set[str]:
        rows = [json.loads(line) for line in (data_dir / f"{split}_questions.jsonl").read_text().splitlines()]
        return {" ".join(row.get("messages", [{"content": row["question"]}])[0]["content"].split()) for row in rows}

    assert not prompts(tmp_path / "one", "train") & prompts(tmp_path / "one", "val")
    write_jsonl(path, rows[::-1])
    prepare(path, tiny_checkpoint, tmp_path / "two", val_fraction=0.25)
    assert prompts(tmp_path / "two", "val") == prompts(tmp_path / "one", "val")
    prepare(path, tiny_checkpoint, tmp_path / "three", val_fraction=0.25, seed=1)
    assert prompts(tmp_path / "three", "val") != prompts(tmp_path / "one", "val")
    two = write_jsonl(tmp_path / "two.jsonl", numbered(2))
    assert set(prepare(two, tiny_checkpoint, tmp_path / "four", val_fraction=0.01)["splits"]) == {"train", "val"}
    one = write_jsonl(tmp_path / "one.jsonl", numbered(1))
    with pytest.raises(InputError, match="one prompt only .one.jsonl#1., which cannot be split"):
        prepare(one, tiny_checkpoint, tmp_path / "five")


def test_held_out_files(tmp_path: Path, tiny_checkpoint: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", numbered(5))
    val = write_jsonl(tmp_path / "val.jsonl", [{"question": "What is 2 plus  one?", "answer": "3"}, numbered(1)[0]])
    report = prepare(train, tiny_checkpoint, tmp_path / "store", val_sources=[val])
    assert {split: entry["examples"] for split, entry in report["splits"].items()} == {"train": 3, "val": 2}
    assert (report["duplicates"], report["prompts_of_val_left_out"]) == (1, 1)
    with pytest.raises(InputError, match="no example for train in"):
        prepare(val, tiny_checkpoint, tmp_path / "other", val_sources=[val])


def test_examples_that_are_too_long(tmp_path: Path, tiny_checkpoint: Path) -> None:
    long = {"instruction": "Count.", "output": "one two three " * 20}
    longer = {"instruction": "Count. " * 40, "output": "one"}
    path = write_jsonl(tmp_path / "rows.jsonl", [*numbered(3), long, longer])
    options = {"max_length": 60, "val_fraction": 0}
    report = prepare(path, tiny_checkpoint, tmp_path / "drop", **options)
    too_long = {"max_length": 60, "dropped": 2, "cut": 0, "rows": ["rows.jsonl#4", "rows.jsonl#5"]}
    assert report["too_long"] == too_long and report["splits"]["train"]["examples"] == 3
    report = prepare(path, tiny_checkpoint, tmp_path / "cut", too_long="cut", **options)
    assert report["too_long"] == too_long | {"dropped": 1, "cut": 1}
    tokenizer = Tokenizer.from_checkpoint(tiny_checkpoint)
    prompt = encode_chat(tokenizer, "chatml", [{"role": "user", "content": "Count."}])
    (cut,) = [example for example in stored(tmp_path / "cut", "train") if len(example[0]) == 60]
    assert cut[1] == [0] * len(prompt) + [1] * (60 - len(prompt)) and tokenizer.special_id("<|im_end|>") != cut[0][-1]
    with pytest.raises(InputError, match="rows.jsonl, line 4: [0-9]+ tokens, more than --max_length 60"):
        prepare(path, tiny_checkpoint, tmp_path / "error", too_long="error", **options)
    with pytest.raises(InputError, match="2 too long.; nothing was written"):
        prepare(write_jsonl(path, [long, longer]), tiny_checkpoint, tmp_path / "error", **options)
    with pytest.raises(InputError, match="--max_length 513: must be 2 to 512, the context of the model"):
        prepare(path, tiny_checkpoint, tmp_path / "error", max_length=513)


def without_template(checkpoint: Path, directory: Path) -> Path:
    directory.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_bytes((checkpoint / name).read_bytes())
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_the_default_style(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    base = without_template(tiny_checkpoint, tmp_path / "base")
    completions = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"{n}", "completion": " a"} for n in range(3)])
    pairs = write_jsonl(tmp_path / "b.jsonl", numbered(3))
    for source, checkpoint, style, why in (
        (completions, tiny_checkpoint, "chatml", "the checkpoint's own"),
        (completions, base, "plain", "no chat template"),
        (pairs, base, "alpaca", "no chat template"),
    ):
        assert prepare(source, checkpoint, tmp_path / "store", overwrite=True)["style"] == style
        error = capsys.readouterr().err
        assert f"prompt style: {style} (" in error and why in error
    prepare(pairs, base, tmp_path / "store", overwrite=True, style="plain")
    assert "prompt style" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "llama3"}, r"no token .*, which prompt style llama3 needs"),
        ({"style": "vicuna"}, "--style 'vicuna' is not one of plain"),
        ({"columns": {"reply": "output"}}, "--columns: 'reply' is none of instruction"),
        ({"style": "mistral"}, "line 3: turn 1: in prompt style mistral user and assistant alternate"),
        ({"val_fraction": 1.0}, "--val_fraction 1.0"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_wrong_options(options: dict, message: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    rows = [*numbered(2), {"messages": [USER, USER, ASSISTANT]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=message):
        prepare(path, tiny_checkpoint, tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_two_turns_of_one_role_are_fine_where_a_style_has_a_form_for_them(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [USER, USER, ASSISTANT, ASSISTANT]}])
    report = prepare(path, tiny_checkpoint, tmp_path / "store", val_fraction=0)
    assert report["splits"]["train"]["learned_answers"] == 2


def test_the_preview_is_the_exact_text(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"messages": [USER, {"role": "assistant", "content": "né 👍"}]}, *numbered(4)]
    )
    preview_instructions([path], InstructionOptions(tiny_checkpoint), show=2)
    printed = capsys.readouterr()
    assert printed.out == "" and [item.name for item in tmp_path.iterdir()] == ["rows.jsonl"]
    assert "<|im_start|>user\nHighest point?<|im_end|>\n<|im_start|>assistant\n⟦né 👍<|im_end|>⟧\n" in printed.err
    assert printed.err.count("--- rows.jsonl#") == 2
    prepare(path, tiny_checkpoint, tmp_path / "store", show=1, learn_prompts=True)
    assert capsys.readouterr().err.count("⟦<|im_start|>user\nHighest") == 1
