"""Make a token store for training out of a folder of documents."""

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, Literal

from lit_llama.command_line import run
from lit_llama.data.corpus import CorpusOptions, prepare_corpus

MOST_REASONS = 20
MOST_NAMES = 5


def main(
    *,
    source: Path | list[Path],
    checkpoint_dir: Path,
    data_dir: Path,
    val_source: Path | list[Path] | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    workers: int | Literal["auto"] = "auto",
    text_key: str = "text",
    title_key: str | None = None,
    near_duplicate_threshold: float | None = 0.8,
    min_characters: int = 1,
    overwrite: bool = False,
) -> None:
    """Read txt, md, html, pdf, jsonl and parquet files, drop duplicates, split by document, tokenize, report.

    Args:
        source: Files and folders, nested ones and gzipped txt, md, html, jsonl included. A file is one document; of
            jsonl and parquet each row is one.
        checkpoint_dir: Model to be trained; its tokenizer is used.
        data_dir: Token store to write.
        val_source: Files and folders to hold out for evaluation; what duplicates them is not trained on. Without it,
            documents of the source are held out.
        val_fraction: Share of documents held out if there is no val_source, chosen by a hash of their text; 0 for none.
        seed: Another seed holds out other documents.
        workers: Processes to read and tokenize with.
        text_key: Key or column of the text in jsonl and parquet.
        title_key: Key or column of a title to put above the text.
        near_duplicate_threshold: Share of common 5-word runs from which the later of two documents is dropped; null to
            drop exact copies only.
        min_characters: Skip shorter documents.
        overwrite: Replace an existing token store.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    report = prepare_corpus(
        source if isinstance(source, list) else [source],
        data_dir,
        CorpusOptions(checkpoint_dir, text_key, title_key, near_duplicate_threshold, min_characters),
        val_sources=val_source if isinstance(val_source, list) or val_source is None else [val_source],
        val_fraction=val_fraction,
        seed=seed,
        workers=None if workers == "auto" else workers,
        overwrite=overwrite,
        command=shlex.join(sys.argv),
    )
    print(describe(report, data_dir))


def describe(report: dict[str, Any], data_dir: Path) -> str:
    """The report as a person reads it."""
    lines = [f"{'split':<8}{'documents':>12}{'words':>14}{'tokens':>14}{'bytes':>16}"]
    for split, counts in report["splits"].items():
        row = [f"{counts[unit]:,}" for unit in ("documents", "words", "tokens", "bytes")]
        lines.append(f"{split:<8}{row[0]:>12}{row[1]:>14}{row[2]:>14}{row[3]:>16}")
    lines += [
        f"tokens per word: {report['tokens_per_word']}",
        f"duplicates removed: {report['exact_duplicates']:,} exact, {report['near_duplicates']:,} near",
    ]
    if report["read_as_windows_1252"]:
        examples = ", ".join(report["read_as_windows_1252_examples"][:3])
        lines.append(f"not UTF-8, read as Windows-1252: {report['read_as_windows_1252']:,} ({examples})")
    longest = report["longest_documents"]
    lines.append("longest documents: " + ", ".join(f"{entry['document']} ({entry['tokens']:,})" for entry in longest))
    lines.append(f"skipped: {sum(entry.get('rows', 1) for entry in report['skipped']):,}")
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for entry in report["skipped"]:
        by_reason.setdefault(entry["reason"], []).append(entry)
    for reason, entries in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:MOST_REASONS]:
        rows = sum(entry.get("rows", 0) for entry in entries)
        count = f"{rows:,} rows of " if rows else ""
        names = ", ".join(entry["file"] for entry in entries[:MOST_NAMES])
        more = ", ..." if len(entries) > MOST_NAMES else ""
        lines.append(f"  {reason}: {count}{len(entries):,} files ({names}{more})")
    if len(by_reason) > MOST_REASONS:
        lines.append(f"  and {len(by_reason) - MOST_REASONS:,} more reasons")
    return "\n".join([*lines, f"token store: {data_dir} (all of this in {data_dir / 'report.json'})"])


def gather(arguments: list[str], option: str) -> list[str]:
    """Bring `option A B` (so a shell expands `option *.pdf`) and `option A option B` into the form that is parsed."""
    values: list[str] = []
    others: list[str] = []
    taking = False
    for argument in arguments:
        if argument == option:
            taking = True
        elif argument.startswith(f"{option}="):
            values.append(argument.removeprefix(f"{option}="))
        elif taking and not argument.startswith("--"):
            values.append(argument)
        else:
            taking = False
            others.append(argument)
    if values:
        others += [option, values[0] if len(values) == 1 else json.dumps(values)]
    return others


if __name__ == "__main__":
    run(main, gather(gather(sys.argv[1:], "--source"), "--val_source"))
