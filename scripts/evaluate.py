"""Measure a model, with or without an adapter: how well it predicts texts and answers questions, and benchmarks."""

import json
import time
from pathlib import Path
from typing import Any, Literal

import torch

from lit_llama.answering import adapter_style, adapter_system
from lit_llama.checkpoint import load_model
from lit_llama.command_line import counted, run
from lit_llama.config import Embeddings, Quantization
from lit_llama.data.packing import TrainingWindows
from lit_llama.errors import InputError
from lit_llama.evaluation.perplexity import open_texts, score_texts
from lit_llama.evaluation.questions import (
    encode_questions,
    evaluate_answers,
    evaluate_choices,
    read_questions,
    spread,
)
from lit_llama.files import refuse_overwrite, write_json
from lit_llama.generation import checked_length
from lit_llama.hardware import peak_memory_gb, pick_device, run_environment
from lit_llama.lora import load_adapter
from lit_llama.packed_linear import pack_linear_layers
from lit_llama.prompts import detect_style
from lit_llama.tokenizer import Tokenizer


def main(
    *,
    checkpoint_dir: Path,
    adapter_dir: Path | None = None,
    data_dirs: dict[str, Path] | None = None,
    split: str = "val",
    text_files: Path | list[Path] | None = None,
    sequence_length: int = 512,
    max_windows: int | None = None,
    question_file: Path | None = None,
    style: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 32,
    max_questions: int | None = None,
    tasks: str | list[str] | None = None,
    tasks_dir: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int = 8,
    quantize: Quantization | None = None,
    embeddings: Embeddings | None = None,
    dtype: Literal["bf16", "fp32"] = "bf16",
    device: str = "auto",
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Measure perplexity on texts, answers to questions, and tasks of the lm-evaluation-harness; JSON on stdout.

    Args:
        checkpoint_dir: Base model, a Hugging Face directory.
        adapter_dir: Adapter to put on it.
        data_dirs: Token stores to score, by a name for each: '{domain: data/factbook, general: data/general}'. Of an
            instruction store only the responses are scored.
        split: Which part of the token stores.
        text_files: Texts (UTF-8) to score, each as one document under its file's name: a path or '[a.txt, b.txt]'.
        sequence_length: Tokens a window; perplexities of different lengths do not compare.
        max_windows: Score only so many windows of each text, spread over it.
        question_file: Questions (JSONL) to answer; those with "choices" are also scored as multiple choice.
        style: Prompt style of the questions; by default the one that the adapter was trained with, else the
            checkpoint's own.
        system: System message of the questions; by default the one that the adapter was trained with.
        max_new_tokens: Longest answer, in tokens.
        max_questions: Ask only so many questions, spread over the file.
        tasks: Tasks of EleutherAI's lm-evaluation-harness: arc_easy, or 'arc_easy,hellaswag'.
        tasks_dir: Directory of further task definitions (YAML).
        num_fewshot: Examples in front of each question of a task; by default what the task says.
        limit: Only the first so many documents of each task.
        apply_chat_template: Put the tasks to the model as chats, in the prompt style.
        batch_size: Windows, questions or requests at a time.
        quantize: Store the base weights in 4 or 8 bits.
        embeddings: Embedding and head in 8 bits (int8), or the embedding in the host's memory (cpu).
        dtype: Precision of weights and computation.
        device: cpu, cuda, mps, or auto for the best there is.
        out: Also write the JSON to this file.
        overwrite: Replace the file.
    """
    start = time.perf_counter()
    if out is not None:
        refuse_overwrite(out, overwrite)
    settings = {
        "split": split,
        "sequence_length": sequence_length,
        "max_windows": max_windows,
        "max_new_tokens": max_new_tokens,
        "max_questions": max_questions,
        "limit": limit,
        "batch_size": batch_size,
    }
    for name, value in settings.items():
        if isinstance(value, int) and value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    tokenizer = Tokenizer.from_checkpoint(checkpoint_dir)
    stores = open_texts(tokenizer, data_dirs or {}, split, text_files)
    windows = {name: TrainingWindows(store, sequence_length, seed=0, shuffle=False) for name, store in stores.items()}
    questions = spread(read_questions(question_file), max_questions) if question_file else []
    tasks = tasks.split(",") if isinstance(tasks, str) else tasks or []
    if not windows and not questions and not tasks:
        raise InputError("nothing to evaluate: give --data_dirs, --text_files, --question_file or --tasks")
    if questions or apply_chat_template:
        style = style or adapter_style(adapter_dir) or detect_style(checkpoint_dir)
        system = adapter_system(adapter_dir) if system is None else system
        settings |= {"style": style, "system": system}
    prompts = encode_questions(tokenizer, questions, style, system)
    if tasks:
        from lit_llama.evaluation.harness import evaluate_tasks, find_tasks

        settings |= {"num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template}
        manager = find_tasks(tasks, tasks_dir)

    place = pick_device(device)
    weights = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = load_model(checkpoint_dir, dtype=weights, device=place, quantize=quantize, embeddings=embeddings)
    if sequence_length > model.config.max_position_embeddings:
        raise InputError(
            f"--sequence_length {sequence_length} is longer than the model's context of"
            f" {model.config.max_position_embeddings} tokens"
        )
    if adapter_dir is not None:
        load_adapter(model, adapter_dir)
    model.eval()
    if prompts:
        checked_length(model, prompts, max_new_tokens)

    result: dict[str, Any] = {
        "model": {
            "checkpoint_dir": str(checkpoint_dir),
            "adapter_dir": None if adapter_dir is None else str(adapter_dir),
            "fingerprint": model.fingerprint,
            "parameters": model.config.num_parameters,
            "quantize": quantize,
            "dtype": dtype,
        },
        "settings": settings,
        "perplexity": score_texts(model, windows, batch_size, max_windows),
    }
    if questions or tasks:
        pack_linear_layers(model)  # from here on it only generates
    if questions:
        with counted("questions answered") as show:
            result["questions"] = evaluate_answers(
                model, tokenizer, questions, style, max_new_tokens, batch_size, show, system
            )
    with_choices = [question for question in questions if question.get("choices")]
    if with_choices:
        with counted("multiple choice: questions scored") as show:
            result["multiple_choice"] = evaluate_choices(
                model, tokenizer, with_choices, style, batch_size, show, system
            )
    if tasks:
        chat = {"style": style, "system": system} if apply_chat_template else {}
        result["tasks"] = evaluate_tasks(model, tokenizer, tasks, manager, num_fewshot, limit, batch_size, **chat)
    result["seconds"] = time.perf_counter() - start
    result["peak_memory_gb"] = peak_memory_gb(place)
    result |= run_environment()
    if out is not None:
        write_json(out, result)
    print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))


if __name__ == "__main__":
    run(main)
