"""Sequence classification: texts or pairs of texts with a label each, as examples that the one training loop takes.

The label of a text is learned as its next token would be: a head with one row a label stands in the place of `lm_head`,
and an example is the text's tokens followed by the number of its label, which is the only target. So packing, batches,
loss, evaluation and resume are those of language modelling. As in transformers' LlamaForSequenceClassification the
head reads the last real token, has no bias and is called `score` where it is stored.
"""

import csv
import hashlib
import json
import math
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lit_llama.command_line import progress
from lit_llama.data.packing import TrainingWindows, collate
from lit_llama.data.token_store import TokenStore, token_dtype
from lit_llama.errors import InputError
from lit_llama.files import read_json, write_json
from lit_llama.generation import evaluating
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer

PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"))
SINGLES = ("text", "sentence")


class LabelledText(NamedTuple):
    """A text to classify; `label` is None where it is not known."""

    text: str
    label: str | None


class Task(NamedTuple):
    """What a classifier was trained on; `labels.json` beside its adapter."""

    labels: list[str]
    template: str
    """How the columns of a row become a text, `{sentence1}\\n{sentence2}`."""
    label_column: str

    def save(self, directory: Path) -> None:
        """Write labels.json."""
        write_json(directory / "labels.json", self._asdict())

    @classmethod
    def load(cls, directory: Path) -> "Task":
        """Read labels.json; InputError where it is missing or not such a file."""
        path = directory / "labels.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file; {directory} is not a classifier of finetune/classify.py")
        try:
            return cls(**read_json(path))
        except TypeError:
            raise InputError(f"{path}: not what finetune/classify.py writes") from None


def read_labelled(
    path: Path, template: str | None, label_column: str, need_label: bool
) -> tuple[list[LabelledText], str]:
    """The rows of a TSV, CSV or JSONL file as texts with labels, and the template that made them.

    Args:
        template: a text with {column} in it; None: recognised by usual names of columns.
        label_column: name of the column with the label.
        need_label: whether a row without a label is an error.

    Raises:
        InputError: an unreadable file, no row, or a row that lacks a column or its label; names the line.
    """
    rows: list[LabelledText] = []
    columns: list[str] = []
    for line, row in _read_rows(path):
        if template is None:
            template = _recognised(path, row)
        columns = columns or [name for _, name, _, _ in string.Formatter().parse(template) if name]
        missing = [name for name in [*columns, *([label_column] if need_label else [])] if row.get(name) in (None, "")]
        if missing:
            raise InputError(f"{path}, line {line}: no {missing[0]!r}; it has {', '.join(map(str, row))}")
        label = row.get(label_column)
        rows.append(LabelledText(template.format_map(row), None if label in (None, "") else str(label)))
    if not rows:
        raise InputError(f"{path} holds no row")
    return rows, template


def _recognised(path: Path, row: dict[str, Any]) -> str:
    """The usual template of the row's columns."""
    for pair in PAIRS:
        if row.keys() >= set(pair):
            return f"{{{pair[0]}}}\n{{{pair[1]}}}"
    for name in SINGLES:
        if name in row:
            return f"{{{name}}}"
    there = ", ".join(map(str, row))
    raise InputError(f"{path}: no usual column of text among {there}: name them, --template $'{{one}}\\n{{other}}'")


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a file; tab-separated files are read as GLUE writes them, where a quote is a quote."""
    kind = path.suffix.lower()
    if kind not in (".tsv", ".csv", ".jsonl"):
        raise InputError(f"{path}: classification data are .tsv, .csv or .jsonl")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind == ".jsonl":
                for line, text in enumerate(file, start=1):
                    if text.strip():
                        row = json.loads(text)
                        if not isinstance(row, dict):
                            raise InputError(f"{path}, line {line}: not a JSON object")
                        yield line, row
                return
            quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {"strict": True}
            reader = csv.DictReader(file, restkey="", **quoting)
            for row in reader:
                if "" in row:
                    raise InputError(f"{path}, line {reader.line_num}: more columns than the header has")
                yield reader.line_num, row
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start} of a block)") from None
    except (csv.Error, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid {kind[1:].upper()} ({error})") from None


def split_off(rows: Sequence[LabelledText], fraction: float) -> tuple[list[LabelledText], list[LabelledText]]:
    """(the others, those held out): of each label its share, chosen by a hash of the text.

    Equal texts stay on one side, so the share is not always met exactly.
    """
    if not 0 < fraction < 1:
        raise InputError(f"--val_fraction {fraction}: must be between 0 and 1, or give --val_file")
    by_label: dict[str | None, list[LabelledText]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    kept, held_out = [], []
    for group in by_label.values():
        digests = [hashlib.blake2b(row.text.encode(), digest_size=8).digest() for row in group]
        last = sorted(digests)[max(1, round(fraction * len(group))) - 1]
        for row, digest in zip(group, digests, strict=True):
            (held_out if digest <= last else kept).append(row)
    if not kept:
        raise InputError(f"{len(rows)} rows are too few to hold some out: give --val_file")
    return kept, held_out


def label_numbers(path: Path, rows: Sequence[LabelledText], labels: Sequence[str]) -> list[int]:
    """The number of each row's label; InputError for one that is not among the labels of training."""
    numbers = {label: number for number, label in enumerate(labels)}
    for place, row in enumerate(rows, start=1):
        if row.label not in numbers:
            raise InputError(
                f"{path}, row {place}: label {row.label!r} does not occur in training ({', '.join(labels)})"
            )
    return [numbers[row.label] for row in rows]


def example_store(
    rows: Sequence[LabelledText], numbers: Sequence[int], tokenizer: Tokenizer, length: int, name: str
) -> TokenStore:
    """A token store in memory, one example a row: the tokens of its text, then the number of its label.

    Args:
        numbers: of the labels.
        length: most tokens of a text; what is beyond is cut off, and how often that happened is said.
        name: stands for the store's directory in messages.
    """
    start = [] if tokenizer.document_start_id is None else [tokenizer.document_start_id]
    encoded = [start + ids for ids in tokenizer.encode_batch([row.text for row in rows])]
    if cut := sum(len(ids) > length for ids in encoded):
        progress(f"{name}: {cut} of {len(rows)} texts are longer than {length} tokens and are cut there")
    examples = [[*ids[:length], number] for ids, number in zip(encoded, numbers, strict=True)]
    offsets = np.cumsum([0, *map(len, examples)], dtype=np.int64)
    mask = np.zeros(offsets[-1], dtype=np.uint8)
    mask[offsets[1:] - 1] = 1
    meta = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {"sha256": tokenizer.sha256},
        "splits": {"text": {"words": 0, "bytes": 0}},
        "examples": True,
    }
    tokens = np.concatenate([np.array(ids, dtype=token_dtype(tokenizer.vocab_size)) for ids in examples])
    return TokenStore(Path(name), "text", tokens, mask, offsets, groups=None, meta=meta)


def add_classification_head(model: Llama, labels: Sequence[str]) -> None:
    """Put a fresh head with a row a label, N(0, 0.02) as transformers draws it, in the place of `lm_head`."""
    weight = model.model.norm.weight
    head = nn.Linear(model.config.hidden_size, len(labels), bias=False, device=weight.device, dtype=weight.dtype)
    nn.init.normal_(head.weight, std=0.02)
    model.lm_head, model.labels = head, list(labels)
    model.config = model.model.config = replace(model.config, tie_word_embeddings=False)


@torch.no_grad()
def label_log_probabilities(model: Llama, store: TokenStore, batch_size: int) -> Tensor:
    """log P(label | text) of every example of a store, fp32 (examples, labels) on the CPU."""
    windows = TrainingWindows(store, 1 << 30, seed=0, shuffle=False, examples="padded")
    device = model.model.norm.weight.device
    order = np.argsort(np.diff(store.offsets), kind="stable").tolist()  # of a length, so that little is padding
    result = torch.empty(len(order), model.lm_head.out_features)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([windows[i] for i in chosen])
            input_ids, _, position_ids, document_ids, targets = (field.to(device) for field in batch[:5])
            hidden = model.model(input_ids, position_ids, document_ids).flatten(0, 1)[targets]
            result[chosen] = model.lm_head(hidden).float().log_softmax(-1).cpu()
    return result


def classification_scores(predicted: Sequence[int], expected: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """How well predicted labels agree with the expected ones.

    Returns:
        {"accuracy", "f1" (mean over labels, unweighted), "matthews" (Gorodkin 2004's R_K, for two labels Matthews'
        correlation; 0 where it is not defined), "by_label": {label: {"precision", "recall", "f1", "count"}},
        "confusion": rows expected, columns predicted}.
    """
    counts = Counter(zip(expected, predicted, strict=True))
    confusion = np.array([[counts[row, column] for column in range(len(labels))] for row in range(len(labels))])
    right, of_expected, of_predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    total = int(confusion.sum())
    by_label = {}
    for number, label in enumerate(labels):
        both = int(of_expected[number] + of_predicted[number])
        by_label[label] = {
            "precision": float(right[number] / of_predicted[number]) if of_predicted[number] else 0.0,
            "recall": float(right[number] / of_expected[number]) if of_expected[number] else 0.0,
            "f1": float(2 * right[number] / both) if both else 0.0,
            "count": int(of_expected[number]),
        }
    spread = math.sqrt(float(total**2 - (of_predicted**2).sum()) * float(total**2 - (of_expected**2).sum()))
    agreement = float(right.sum()) * total - float((of_expected * of_predicted).sum())
    return {
        "accuracy": float(right.sum() / total),
        "f1": float(np.mean([scores["f1"] for scores in by_label.values()])),
        "matthews": agreement / spread if spread else 0.0,
        "by_label": by_label,
        "confusion": confusion.tolist(),
    }
