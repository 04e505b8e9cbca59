"""Files appear whole or not at all."""

from pathlib import Path

import pytest

from lit_llama.errors import InputError
from lit_llama.files import atomic_directory, atomic_file, read_json, read_jsonl, refuse_overwrite, write_json


def test_a_file_keeps_its_old_content_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write("half")
        raise RuntimeError
    assert read_json(path) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_a_directory_is_replaced_as_a_whole_and_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with atomic_directory(path) as directory:
        (directory / "one").write_text("1")
    with pytest.raises(InputError, match="out exists already.*--overwrite true"), atomic_directory(path):
        pass
    with pytest.raises(RuntimeError), atomic_directory(path, overwrite=True) as directory:
        (directory / "two").write_text("2")
        raise RuntimeError
    assert [item.name for item in path.iterdir()] == ["one"]
    with atomic_directory(path, overwrite=True) as directory:
        (directory / "two").write_text("2")
    assert [item.name for item in path.iterdir()] == ["two"] and list(tmp_path.iterdir()) == [path]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse_overwrite(tmp_path / "empty", overwrite=False)
    refuse_overwrite(tmp_path / "missing", overwrite=False)


def test_bad_json_is_one_line_that_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": }\n')
    with pytest.raises(InputError, match=r"rows.jsonl, line 3: not valid JSON"):
        read_jsonl(path)
    path.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(InputError, match=r"rows.jsonl, line 2: expected a JSON object, found list"):
        read_jsonl(path)
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(InputError, match="not UTF-8"):
        read_jsonl(path)
    for read in (read_json, read_jsonl):
        with pytest.raises(InputError, match="missing.json: no such file"):
            read(tmp_path / "missing.json")
    with pytest.raises(ValueError):
        write_json(tmp_path / "nan.json", float("nan"))
