"""Reading documents: every format, what is skipped and why, encodings, cleaning and HTML."""

import gzip
import json
import os
from pathlib import Path

import pytest

from lit_llama.data.documents import Document, RowChunk, Skipped, chunks, find_files, read
from lit_llama.data.extraction import Unusable, clean, declared_encoding, decode, html_text, pdf_text


def documents(*sources: Path, text_key: str = "text", title_key: str | None = None) -> list[Document | Skipped]:
    found = []
    for chunk in chunks(sources, text_key, title_key):
        found += [chunk] if isinstance(chunk, Skipped) else read(chunk, text_key, title_key)
    return found


def texts(*sources: Path, **keys) -> list[str]:
    return [found.text for found in documents(*sources, **keys) if isinstance(found, Document)]


def reasons(*sources: Path, **keys) -> dict[str, str]:
    return {Path(found.file).name: found.reason for found in documents(*sources, **keys) if isinstance(found, Skipped)}


def make_pdf(path: Path, lines: list[str], password: str | None = None) -> None:
    """A PDF of one page a line, in Helvetica; a blank page for an empty line."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    for line in lines:
        page = writer.add_blank_page(300, 300)
        font = DictionaryObject(
            {
                NameObject("/Type"): NameObject("/Font"),
                NameObject("/Subtype"): NameObject("/Type1"),
                NameObject("/BaseFont"): NameObject("/Helvetica"),
            }
        )
        resources = DictionaryObject({NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})})
        page[NameObject("/Resources")] = resources
        content = DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 20 200 Td ({line}) Tj ET".encode("latin-1") if line else b"")
        page[NameObject("/Contents")] = writer._add_object(content)
    if password is not None:
        writer.encrypt(password, algorithm="RC4-128")
    with open(path, "wb") as file:
        writer.write(file)


def test_every_format_gives_its_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    nested = tmp_path / "a" / "b"
    nested.mkdir(parents=True)
    (tmp_path / "1.txt").write_text("plain text")
    (tmp_path / "2.md").write_text("# Title\n\n*mark* down")
    (tmp_path / "3.html").write_text("<html><head><title>no</title></head><body><p>hyper <i>text</i></p></body></html>")
    make_pdf(tmp_path / "4.pdf", ["first page", "second page"])
    (tmp_path / "5.jsonl").write_text('{"text": "row one"}\n\n{"text": "row two", "x": 1}')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["cell one", "cell two"]}), tmp_path / "6.parquet")
    (nested / "7.TXT").write_text("nested")
    for name, content in (("8.txt", "zip text"), ("9.html", "<p>zip page"), ("a.jsonl", '{"text": "zip row"}')):
        (nested / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    expected = {"plain text", "# Title\n\n*mark* down", "hyper text", "first page\n\nsecond page", "row one", "row two"}
    expected |= {"cell one", "cell two", "nested", "zip text", "zip page", "zip row"}
    assert set(texts(tmp_path)) == expected and len(documents(tmp_path)) == len(expected)
    assert texts(tmp_path / "1.txt", nested / "7.TXT") == ["plain text", "nested"]
    names = [found.name for found in documents(tmp_path / "5.jsonl")]
    assert names == [f"{tmp_path}/5.jsonl#1", f"{tmp_path}/5.jsonl#3"]


def test_bad_files_are_skipped_with_their_reason(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\x00\x01\x02" * 50)
    (tmp_path / "noise.txt").write_bytes(bytes(range(1, 256)) * 4)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.md").write_text(" \n\t\n")
    make_pdf(tmp_path / "scan.pdf", [""])
    make_pdf(tmp_path / "secret.pdf", ["hidden"], password="word")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4\nnothing more")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "page.pdf.gz").write_bytes(gzip.compress(b"%PDF"))
    (tmp_path / "not.txt.gz").write_bytes(b"plain after all")
    (tmp_path / "table.parquet").write_bytes(b"PAR1 no table")
    (tmp_path / "script.html").write_text("<body><script>alert(1)</script><nav>menu</nav></body>")
    (tmp_path / "good.txt").write_text("good")
    found = reasons(tmp_path)
    assert found.pop("binary.txt") == "binary (NUL bytes)"
    assert found.pop("noise.txt").startswith("undecodable")
    assert found.pop("scan.pdf").startswith("PDF without text")
    assert found.pop("secret.pdf").startswith("encrypted PDF")
    assert found.pop("image.png") == "unknown suffix '.png'"
    assert found.pop("page.pdf.gz") == "unknown suffix '.pdf.gz'"
    assert {found.pop(name) for name in ("empty.txt", "blank.md", "script.html")} == {"empty"}
    assert all(found.pop(name).startswith("unreadable: ") for name in ("broken.pdf", "not.txt.gz", "table.parquet"))
    assert found == {} and texts(tmp_path) == ["good"]


def test_a_pdf_with_an_empty_password_is_read(tmp_path: Path) -> None:
    make_pdf(tmp_path / "a.pdf", ["printing only"], password="")
    assert pdf_text((tmp_path / "a.pdf").read_bytes()) == "printing only"


def test_rows_without_text_are_skipped_by_row(tmp_path: Path) -> None:
    rows = ['{"text": "good"}', '{"body": "x"}', "{broken", "[1]", '{"text": 5}', '{"text": "  "}', '{"text": null}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    found = documents(tmp_path)
    assert [item.row for item in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [item.reason for item in found[1:]] == [
        "no key 'text'",
        "not a line of JSON",
        "not a JSON object",
        "'text' is int, not text",
        "empty",
        "'text' is NoneType, not text",
    ]


def test_keys_and_titles(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"name": "Oslo", "body": "A city."}, {"body": "No title."}, {"name": None, "body": "Null title."}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = {"name": ["Bergen", None], "body": ["Rainy.", "Untitled."]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    with_titles = ["Oslo\n\nA city.", "No title.", "Null title.", "Bergen\n\nRainy.", "Untitled."]
    assert texts(tmp_path, text_key="body", title_key="name") == with_titles
    assert texts(tmp_path, text_key="body") == ["A city.", "No title.", "Null title.", "Rainy.", "Untitled."]
    assert reasons(tmp_path)["t.parquet"] == "no column 'text' (columns: name, body)"


def test_a_truncated_gzip_gives_the_rows_before_the_damage(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {i} {os.urandom(40).hex()}"}) for i in range(2000)]
    data = gzip.compress("\n".join(lines).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(data[: len(data) // 2])
    *rows, last = documents(tmp_path)
    good = [row.text for row in rows if isinstance(row, Document)]
    assert 500 < len(good) < 1500 and good == [json.loads(line)["text"] for line in lines[: len(good)]]
    assert last.reason.startswith("unreadable: EOFError")


def test_large_files_come_in_many_chunks_with_all_their_rows(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {i} " + "x" * 5000}) for i in range(700)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = list(chunks([tmp_path], "text"))
    assert all(isinstance(chunk, RowChunk) and sum(map(len, chunk.rows)) < 1.1e6 for chunk in found) and len(found) > 3
    assert sum(chunk.source_bytes for chunk in found) == (tmp_path / "rows.jsonl").stat().st_size
    assert [text.split(" ")[1] for text in texts(tmp_path)] == [str(i) for i in range(700)]


def test_hidden_files_and_link_loops_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config.txt").write_text("hidden")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.txt").write_text("b")
    (tmp_path / "sub/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    assert texts(tmp_path) == ["a", "b"]
    assert set(reasons(tmp_path)) == {"self.txt", "gone.txt", "pipe.txt"}
    assert texts(tmp_path, tmp_path / "sub") == ["a", "b"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    assert reasons(tmp_path)["a.txt"].startswith("unreadable: PermissionError")


def test_the_order_of_files_is_fixed(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "c/a.txt", "B.txt", "10.txt", "9.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [str(Path(file).relative_to(tmp_path)) for file, _ in find_files([tmp_path])] == [
        "10.txt",
        "9.txt",
        "B.txt",
        "a/z.txt",
        "b.txt",
        "c/a.txt",
    ]


@pytest.mark.parametrize(
    "data, text, fallback",
    [
        ("Zürich, 東京".encode(), "Zürich, 東京", False),
        ("Zürich".encode("utf-8-sig"), "Zürich", False),
        ("Zürich, 東京".encode("utf-16"), "Zürich, 東京", False),
        (b"\xfe\xff" + "Zürich".encode("utf-16-be"), "Zürich", False),
        ("Zürich: “one €”, déjà vu".encode("cp1252"), "Zürich: “one €”, déjà vu", True),
    ],
)
def test_encodings_of_text(data: bytes, text: str, fallback: bool) -> None:
    assert decode(data) == (text, fallback)


@pytest.mark.parametrize("text", ["Москва столица России", "東京は日本の首都です"])
def test_an_encoding_that_cannot_be_told_is_not_guessed(text: str) -> None:
    with pytest.raises(Unusable):
        decode(text.encode("cp1251" if text[0] == "М" else "shift_jis"))


def test_a_page_is_read_in_the_encoding_it_declares() -> None:
    for encoding in ("iso-8859-1", "windows-1251", "shift_jis", "utf-8"):
        text = {"windows-1251": "Москва", "shift_jis": "東京"}.get(encoding, "Zürich")
        page = f'<meta charset="{encoding}"><p>{text}</p>'.encode(encoding)
        assert html_text(decode(page, declared_encoding(page))[0]).strip() == text
    assert decode(b'<meta charset="iso-8859-1">\x93quoted\x94', "cp1252")[0].endswith("“quoted”")


def test_cleaning_keeps_text_and_drops_what_nobody_sees() -> None:
    assert clean("a\r\nb\rc\x0cd\u2028e") == "a\nb\nc\nd\ne"
    assert clean("\n\n  indented  \t\n\n\n\n\nnext\t \n") == "  indented\n\nnext"
    assert clean("e\u0301") == "é"
    assert clean("\ufeffco\u00adoperate\x00\x1b[0m") == "cooperate[0m"
    assert clean("lone \ud800 surrogate") == "lone \ufffd surrogate"
    kept = "tab\tstop, ﬁne ½ 5 µm, zero‍width joiner, nbsp\u00a0here, 👩‍🔬"
    assert clean(kept) == kept


def test_html_layout() -> None:
    page = """<body><header>Head</header><nav>menu</nav><h1>Hi &amp; you</h1>
      <p>one <b>two</b>
      three<br>four</p><pre>  a\n    b</pre>after<ul><li>x<li><p>y <a href="#">link</a></p></ul><!-- no -->
      <table><tr><th>capital</th> <td>Oslo</td></tr><tr><td>3<td>4</table><footer>foot</footer><style>p{}</style>"""
    expected = "Head\n\nHi & you\n\none two three\nfour\n\n  a\n    b\n\nafter\n\n- x\n- y link\n\ncapital\tOslo\n3\t4"
    assert clean(html_text(page)) == expected


def test_html_main_content_wins() -> None:
    assert clean(html_text("<body>menu<main><p>text</p></main>ads</body>")) == "text"
    assert clean(html_text("<body>menu<article>text</article>ads</body>")) == "text"
    assert clean(html_text("<body>list<article>one</article><article>two</article></body>")) == "list\n\none\n\ntwo"
    assert html_text("") == "" and clean(html_text("just words")) == "just words"


def test_html_of_broken_markup_keeps_every_word() -> None:
    page = "<div><p>one<div><b>two<table>three<td>four</div></i>" + "<span>" * 300 + "five"
    assert "".join(html_text(page).split()) == "onetwothreefourfive"
