"""Teach a model to classify texts, or pairs of texts, training a LoRA adapter and a head.

python finetune/classify.py --checkpoint_dir checkpoints/smollm2-135m-instruct --train_file train.tsv --test_file
dev.tsv --out_dir out/my_classifier
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from lit_llama.adapter_files import fill_parameters, read_adapter_state
from lit_llama.checkpoint import load_model
from lit_llama.classification import (
    LabelledText,
    Task,
    add_classification_head,
    classification_scores,
    example_store,
    label_log_probabilities,
    label_numbers,
    read_labelled,
    split_off,
)
from lit_llama.command_line import progress, run
from lit_llama.config import Embeddings, Quantization
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore
from lit_llama.files import write_json
from lit_llama.lora import LoRAConfig, adapter_parameters, inject_lora, save_adapter, trained_summary
from lit_llama.mlp_partition import MLPRoutingConfig, route_mlp
from lit_llama.model import Llama
from lit_llama.parallel import loading_device
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, RunArguments, TrainConfig, start_fabric, train


@dataclass(kw_only=True)
class Arguments(RunArguments):
    """Finetune for sequence classification with LoRA; out_dir becomes a PEFT adapter directory with labels.json.

    Files are .tsv, .csv or .jsonl with a label and one or two texts a row. Every row is an example; batch sizes count
    examples. The best state, best/, is the one of the lowest loss on the validation rows.
    """

    train_file: Path
    """What is trained on."""
    val_file: Path | None = None
    """What is measured while training; by default a part of train_file that is held out."""
    val_fraction: float = 0.1
    """That part."""
    test_file: Path | None = None
    """Measured once, at the end, by the last and the best state."""
    template: str | None = None
    """How a row becomes a text: $'{sentence1}\\n{sentence2}' in a shell. By default by the usual names of columns."""
    label_column: str = "label"
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            epochs=3, learning_rate=2e-4, packed=False, micro_batch_size=16, global_batch_size=16
        )
    )
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(modules_to_save=["score"], embedding_learning_rate=1.0))
    quantize: Quantization | None = None
    """Keep the frozen base in 4 bits (nf4, nf4-dq, int4) or 8 bits (int8)."""
    embeddings: Embeddings | None = None
    """Embedding in 8 bits (int8) or in the host's memory (cpu)."""
    partition: MLPRoutingConfig | None = None
    """Route tokens through some experts of each MLP; for a checkpoint of scripts/partition_mlp.py."""


def main(arguments: Arguments) -> None:
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    column, length, batch_size = arguments.label_column, arguments.train.sequence_length, arguments.eval.batch_size
    rows, template = read_labelled(arguments.train_file, arguments.template, column, need_label=True)
    train_rows, val_rows, val_name = *split_off(rows, arguments.val_fraction), arguments.train_file
    if arguments.val_file is not None:
        train_rows, val_name = rows, arguments.val_file
        val_rows, _ = read_labelled(val_name, template, column, need_label=True)
    task = Task(sorted({row.label for row in train_rows}), template, column)

    def store(path: Path, rows: list[LabelledText]) -> TokenStore:
        return example_store(rows, label_numbers(path, rows, task.labels), tokenizer, length, str(path))

    train_store, val_store = store(arguments.train_file, train_rows), store(val_name, val_rows)
    tests = {"val": val_store}
    if arguments.test_file is not None:
        tests["test"] = store(
            arguments.test_file, read_labelled(arguments.test_file, template, column, need_label=True)[0]
        )

    device = loading_device(fabric, arguments.quantize)
    model = load_model(arguments.checkpoint_dir, arguments.dtype, device, arguments.quantize, arguments.embeddings)
    add_classification_head(model, task.labels)
    inject_lora(model, arguments.lora)
    if arguments.partition is not None:
        route_mlp(model, arguments.partition)

    def scores(store: TokenStore) -> dict:
        predicted = label_log_probabilities(model, store, batch_size).argmax(-1).tolist()
        return classification_scores(predicted, store.tokens[store.offsets[1:] - 1].tolist(), task.labels)

    def measure(_: Llama) -> dict[str, float]:
        return {f"val_{name}": value for name, value in scores(val_store).items() if isinstance(value, float)}

    def save(directory: Path) -> None:
        save_adapter(model, directory, base_model=str(arguments.checkpoint_dir))
        task.save(directory)

    if fabric.is_global_zero:
        progress(f"{len(train_rows)} examples, labels {', '.join(task.labels)}; {trained_summary(model)}")
    options = {"examples": "packed" if arguments.train.packed else "padded"}
    windows = TrainingWindows(
        train_store, length, arguments.train.seed, batch_size=arguments.train.global_batch_size, **options
    )
    held_out = TrainingWindows(val_store, length, seed=0, shuffle=False, **options)
    report = train(fabric, model, tokenizer, Corpus(windows, held_out, None, [], measure), arguments, save)
    if not fabric.is_global_zero:
        return
    result = {"last": {name: scores(store) for name, store in tests.items()}}
    if report["best_step"] not in (None, report["steps"]):
        best = arguments.out_dir / "best"
        fill_parameters(adapter_parameters(model), read_adapter_state(best, model.fingerprint), best)
        result["best"] = {name: scores(store) for name, store in tests.items()}
    write_json(arguments.out_dir / "evaluation.json", result)
    print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    run(main)
