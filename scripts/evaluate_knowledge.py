"""Measure what a model knows of documents: closed-book or with passages to read, what it recalls and what it forgot."""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from lit_llama.answering import adapter_style, adapter_system
from lit_llama.checkpoint import load_model
from lit_llama.command_line import counted, progress, run
from lit_llama.config import Embeddings, Quantization
from lit_llama.data.packing import TrainingWindows
from lit_llama.errors import InputError
from lit_llama.evaluation.knowledge import (
    answer_briefly,
    answer_entropy,
    answer_limits,
    cells,
    check_knowledge_questions,
    evaluate_knowledge,
)
from lit_llama.evaluation.perplexity import open_texts, score_texts
from lit_llama.evaluation.questions import encode_questions, read_questions, spread
from lit_llama.evaluation.recall import is_switchable, kl_to_base, value_recall, without_adapter
from lit_llama.evaluation.retrieval import with_passages
from lit_llama.files import refuse_overwrite, write_json
from lit_llama.generation import checked_length
from lit_llama.hardware import peak_memory_gb, pick_device, run_environment
from lit_llama.injection.facts import read_facts
from lit_llama.injection.interface import Document
from lit_llama.injection.preparation import read_documents
from lit_llama.lora import load_adapter
from lit_llama.model import Llama
from lit_llama.packed_linear import pack_linear_layers
from lit_llama.prompts import detect_style
from lit_llama.tokenizer import Tokenizer

Rows = list[dict[str, Any]]


def main(
    *,
    checkpoint_dir: Path,
    question_file: Path,
    adapter_dir: Path | None = None,
    base_dir: Path | None = None,
    documents: Path | None = None,
    facts_file: Path | None = None,
    data_dirs: dict[str, Path] | None = None,
    general: str = "general",
    context: Literal["none", "oracle", "bm25"] = "none",
    top_k: int = 3,
    passage_words: int = 100,
    style: str | None = None,
    system: str | None = None,
    max_questions: int | None = None,
    max_documents: int | None = None,
    sequence_length: int = 512,
    max_windows: int | None = None,
    batch_size: int = 16,
    quantize: Quantization | None = None,
    embeddings: Embeddings | None = None,
    dtype: Literal["bf16", "fp32"] = "bf16",
    device: str = "auto",
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Ask a model about documents, and measure what it recalls of them and how far it went from its base.

    Args:
        checkpoint_dir: Base model, or a fully trained one, a Hugging Face directory.
        question_file: Questions (JSONL) with "split", "form", "phrasing" and "relation": scripts/prepare_questions.py
            writes them.
        adapter_dir: Adapter to put on the model.
        base_dir: The model before training, where checkpoint_dir is a fully trained one.
        documents: Folder of the documents: to recall, and to read in open-book contexts.
        facts_file: Facts whose values are to be recalled; by default the answers of the direct questions.
        data_dirs: Token stores to score (their part "val"): '{domain: data/factbook/tokens, general: data/general}'.
        general: Name of the one among them on which the divergence from the base is measured.
        context: What stands before a question: none (closed-book, and documents are recalled); oracle: its own
            document; bm25: passages of all documents, found by the words of the question.
        top_k: Passages before a question.
        passage_words: Longest passage, in words.
        style: Prompt style; by default the one that the adapter was trained with, else the checkpoint's own.
        system: System message; by default the one that the adapter was trained with.
        max_questions: Ask only so many questions, spread over the file.
        max_documents: Recall only so many documents of each split.
        sequence_length: Tokens a window of texts and documents; perplexities of different lengths do not compare.
        max_windows: Score only so many windows of each text, spread over it.
        batch_size: Questions or windows at a time.
        quantize: Store the base weights in 4 or 8 bits.
        embeddings: Embedding and head in 8 bits (int8), or the embedding in the host's memory (cpu).
        dtype: Precision of weights and computation.
        device: cpu, cuda, mps, or auto for the best there is.
        out: Write the JSON to this file, and only a table of the answers to stdout.
        overwrite: Replace the file.
    """
    start = time.perf_counter()
    if out is not None:
        refuse_overwrite(out, overwrite)
    settings = {
        "question_file": str(question_file),
        "documents": None if documents is None else str(documents),
        "context": context,
        "top_k": top_k,
        "passage_words": passage_words,
        "max_questions": max_questions,
        "max_documents": max_documents,
        "sequence_length": sequence_length,
        "max_windows": max_windows,
        "batch_size": batch_size,
    }
    for name, value in settings.items():
        if isinstance(value, int) and value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    if adapter_dir is not None and base_dir is not None:
        raise InputError("--base_dir is for a fully trained checkpoint; the base of an adapter is --checkpoint_dir")
    if context != "none" and documents is None:
        raise InputError(f"--context {context} needs --documents")
    tokenizer = Tokenizer.from_checkpoint(checkpoint_dir)
    if base_dir is not None and Tokenizer.from_checkpoint(base_dir).sha256 != tokenizer.sha256:
        raise InputError(f"{base_dir} has another tokenizer than {checkpoint_dir}: it is not its base")
    questions = read_questions(question_file)
    check_knowledge_questions(questions, question_file)
    texts = [] if documents is None else read_documents([documents])
    to_recall = _by_split(texts, questions, max_documents) if context == "none" else {}
    values = _values(facts_file, questions)
    questions = spread(questions, max_questions)
    style = style or adapter_style(adapter_dir) or detect_style(checkpoint_dir)
    system = adapter_system(adapter_dir) if system is None else system
    settings |= {"style": style, "system": system}
    asked = questions
    if context != "none":
        asked, questions = with_passages(questions, texts, context, top_k, passage_words)
        without = sum(not row["passages"] for row in questions)
        if without:
            progress(f"note: {without:,} of {len(questions):,} questions have no passage and are asked closed-book")
    prompts = encode_questions(tokenizer, asked, style, system)
    limits = answer_limits(tokenizer, style, questions)
    stores = open_texts(tokenizer, data_dirs or {}, "val", None)
    windows = {name: TrainingWindows(store, sequence_length, seed=0, shuffle=False) for name, store in stores.items()}

    place = pick_device(device)
    weights = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]

    def load(directory: Path) -> Llama:
        return load_model(directory, dtype=weights, device=place, quantize=quantize, embeddings=embeddings).eval()

    model = load(checkpoint_dir)
    if sequence_length > model.config.max_position_embeddings:
        raise InputError(
            f"--sequence_length {sequence_length} is longer than the model's context of"
            f" {model.config.max_position_embeddings} tokens"
        )
    checked_length(model, prompts, max(limits))
    if adapter_dir is not None:
        load_adapter(model, adapter_dir)
        model.eval()
        if not is_switchable(model):
            base_dir = checkpoint_dir
    base = None if base_dir is None else load(base_dir)

    result: dict[str, Any] = {
        "model": {
            "checkpoint_dir": str(checkpoint_dir),
            "adapter_dir": None if adapter_dir is None else str(adapter_dir),
            "base_dir": None if base_dir is None else str(base_dir),
            "fingerprint": model.fingerprint,
            "parameters": model.config.num_parameters,
            "quantize": quantize,
            "dtype": dtype,
        },
        "settings": settings,
        "texts": score_texts(model, windows, batch_size, max_windows),
    }
    result["recall"] = {}
    for split, of_split in to_recall.items():
        with counted(f"{split} documents: windows recalled") as show:
            recall = value_recall(model, tokenizer, of_split, values, sequence_length, batch_size, show)
        result["recall"][split] = recall
    result["kl_to_base"] = result["locality"] = None
    before: dict[int, str] = {}
    if adapter_dir is not None or base is not None:
        if general in windows:
            with counted(f"{general}: windows compared with the base") as show:
                result["kl_to_base"] = kl_to_base(model, windows[general], base, batch_size, max_windows, show)
        known = [number for number, question in enumerate(questions) if question["split"] == "known"]
        with nullcontext() if base is not None else without_adapter(model), counted("answered by the base") as show:
            of_known = [prompts[number] for number in known], [limits[number] for number in known]
            said = answer_briefly(base or model, tokenizer, *of_known, style, batch_size, show)
        before = dict(zip(known, said, strict=True))
    del base
    pack_linear_layers(model)  # from here on it only generates
    with counted("questions answered") as show:
        rows = evaluate_knowledge(model, tokenizer, questions, prompts, style, system, batch_size, show)
    if before:
        same = sum(rows[number]["answer"] == answer for number, answer in before.items())
        result["locality"] = {"count": len(before), "agreement": same / len(before)}
    result |= {
        "cells": cells(rows),
        "answer_entropy": answer_entropy(rows, lambda row: row["answer"]),
        "right_answer_entropy": answer_entropy(rows, lambda row: row["answers"][0]),
        "rows": rows,
        "seconds": time.perf_counter() - start,
        "peak_memory_gb": peak_memory_gb(place),
    }
    result |= run_environment()
    if out is not None:
        write_json(out, result)
        print(_table(result["cells"]))
    else:
        print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))


def _by_split(texts: list[Document], questions: Rows, most: int | None) -> dict[str, list[Document]]:
    """The documents that there are questions on, by their split, at most so many of each."""
    split_of = {question.get("doc_id"): question["split"] for question in questions}
    found: dict[str, list[Document]] = {}
    for document in texts:
        if document.id in split_of:
            found.setdefault(split_of[document.id], []).append(document)
    return {split: spread(of_split, most) for split, of_split in sorted(found.items())}


def _values(facts_file: Path | None, questions: Rows) -> dict[str, list[str]]:
    """What is to be recalled of each document, by its id."""
    if facts_file is not None:
        pairs = [(fact.doc_id, fact.value) for fact in read_facts(facts_file)]
    else:
        pairs = [(row.get("doc_id"), row["answers"][0]) for row in questions if row["form"] == "direct"]
    values: dict[str, list[str]] = {}
    for doc_id, value in dict.fromkeys(pairs):
        values.setdefault(doc_id, []).append(value)
    return values


def _table(of_splits: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The cells as Markdown."""
    lines = ["| split | questions | count | exact match | F1 | answer named |", "|:--|:--|--:|--:|--:|--:|"]
    for split, of_split in of_splits.items():
        for name, cell in of_split.items():
            scores = " | ".join(f"{cell[measure]:.1%}" for measure in ("exact_match", "f1", "contains"))
            lines.append(f"| {split} | {name} | {cell['count']} | {scores} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
