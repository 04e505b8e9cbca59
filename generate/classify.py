"""Let a classifier that finetune/classify.py trained label texts: a line of JSON for each on stdout.

python generate/classify.py --checkpoint_dir checkpoints/smollm2-135m-instruct --adapter_dir out/my_classifier --file
new.tsv
"""

import json
from pathlib import Path
from typing import Literal

import torch

from lit_llama.checkpoint import load_model
from lit_llama.classification import (
    Task,
    add_classification_head,
    example_store,
    label_log_probabilities,
    read_labelled,
)
from lit_llama.command_line import progress, run
from lit_llama.config import Embeddings, Quantization
from lit_llama.errors import InputError
from lit_llama.hardware import pick_device
from lit_llama.lora import load_adapter
from lit_llama.tokenizer import Tokenizer


def main(
    *,
    checkpoint_dir: Path,
    adapter_dir: Path,
    file: Path,
    max_length: int = 512,
    batch_size: int = 16,
    quantize: Quantization | None = None,
    embeddings: Embeddings | None = None,
    dtype: Literal["bf16", "fp32"] = "bf16",
    device: str = "auto",
) -> None:
    """Print {"label", "probability", "expected"?} for every row of a file, and how many expected labels were met.

    Args:
        checkpoint_dir: Base model, a Hugging Face directory.
        adapter_dir: What finetune/classify.py wrote.
        file: .tsv, .csv or .jsonl with the columns that the classifier was trained on; labels may be missing.
        max_length: Tokens of a text that are read.
        batch_size: Texts at a time.
        quantize: Store the base weights in 4 or 8 bits.
        embeddings: Embedding in 8 bits (int8) or in the host's memory (cpu).
        dtype: Precision of weights and computation.
        device: cpu, cuda, mps, or auto for the best there is.
    """
    if min(max_length, batch_size) < 1:
        raise InputError("--max_length and --batch_size must be at least 1")
    task = Task.load(adapter_dir)
    rows, _ = read_labelled(file, task.template, task.label_column, need_label=False)
    tokenizer = Tokenizer.from_checkpoint(checkpoint_dir)
    weights = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = load_model(checkpoint_dir, weights, pick_device(device), quantize, embeddings)
    add_classification_head(model, task.labels)
    load_adapter(model, adapter_dir)
    store = example_store(rows, [0] * len(rows), tokenizer, max_length, str(file))
    probabilities, predicted = label_log_probabilities(model, store, batch_size).exp().max(-1)
    right = 0
    for row, probability, number in zip(rows, probabilities.tolist(), predicted.tolist(), strict=True):
        label = task.labels[number]
        right += label == row.label
        expected = {} if row.label is None else {"expected": row.label}
        print(json.dumps({"label": label, "probability": probability, **expected}, ensure_ascii=False))
    if labelled := sum(row.label is not None for row in rows):
        progress(f"{right} of {labelled} expected labels met ({right / labelled:.1%})")


if __name__ == "__main__":
    run(main)
