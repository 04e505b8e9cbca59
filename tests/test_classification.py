"""Sequence classification against transformers' LlamaForSequenceClassification with PEFT, and scikit-learn's scores."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import sklearn.metrics
import torch
from conftest import run_script
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_llama.checkpoint import load_model
from lit_llama.classification import (
    LabelledText,
    add_classification_head,
    classification_scores,
    example_store,
    label_log_probabilities,
    read_labelled,
    split_off,
)
from lit_llama.data.packing import TrainingWindows, collate
from lit_llama.errors import InputError
from lit_llama.lora import LoRAConfig, adapter_parameters, inject_lora, load_adapter, lora_layers, save_adapter
from lit_llama.loss import head_loss
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import total_parameters, training_flops_per_token

LABELS = ["no", "yes", "maybe"]
PAIRS = [
    ("Oslo is the capital of Norway.", 'Norway has a "capital".', "yes"),
    ("The Amazon carries more water than any other river.", "The Amazon is dry.", "no"),
    ("The quick brown fox jumps.", "A fox moves over the lazy dog and is quick about it.", "maybe"),
    ("Fiji.", "An island.", "yes"),
    ("Mount Everest is the highest point of Nepal, at 8,849 metres.", "Nepal is flat.", "no"),
] * 4


def written(path: Path, kind: str) -> Path:
    rows = [{"id": i, "sentence1": f"{a} {i}", "sentence2": b, "label": label} for i, (a, b, label) in enumerate(PAIRS)]
    file = path / f"pairs.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "tsv":
        lines = ["\t".join(rows[0])] + ["\t".join(map(str, row.values())) for row in rows]
        file.write_text("\n".join(lines) + "\n")
    else:
        import csv

        with open(file, "w", newline="") as out:
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return file


def classifier(checkpoint: Path, **options) -> Llama:
    """With an adapter whose update is not zero."""
    model = load_model(checkpoint, torch.float32)
    torch.manual_seed(0)
    add_classification_head(model, LABELS)
    inject_lora(model, LoRAConfig(r=4, modules_to_save=["score"], **options))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def stored(checkpoint: Path):
    rows = [LabelledText(f"{a}\n{b}", label) for a, b, label in PAIRS]
    numbers = [LABELS.index(row.label) for row in rows]
    return rows, numbers, example_store(rows, numbers, Tokenizer.from_checkpoint(checkpoint), 64, "pairs")


def tokenized(checkpoint: Path, rows: list[LabelledText]) -> dict[str, torch.Tensor]:
    """By transformers, padded on the right; a text begins with the token that begins a document."""
    tokenizer, start = (
        AutoTokenizer.from_pretrained(checkpoint),
        Tokenizer.from_checkpoint(checkpoint).document_start_id,
    )
    ids = [tokenizer(row.text, add_special_tokens=False).input_ids for row in rows]
    ids = [row if start is None else [start, *row] for row in ids]
    return dict(tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right"))


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_files_become_texts_with_labels(tmp_path: Path, kind: str) -> None:
    rows, template = read_labelled(written(tmp_path, kind), None, "label", need_label=True)
    assert template == "{sentence1}\n{sentence2}"
    assert rows[0] == ('Oslo is the capital of Norway. 0\nNorway has a "capital".', "yes")
    assert [row.label for row in rows] == [label for *_, label in PAIRS]
    singles, _ = read_labelled(written(tmp_path, kind), "Is it? {sentence2}", "absent", need_label=False)
    assert singles[3] == ("Is it? An island.", None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "sentence1\tsentence2\tlabel\na\tb\tyes\nc\td\n", r"a.tsv, line 3: no 'label'"),
        ("a.tsv", "sentence1\tsentence2\tlabel\n\tb\tyes\n", r"a.tsv, line 2: no 'sentence1'"),
        ("a.tsv", "sentence1\tsentence2\tlabel\na\tb\tyes\tmore\n", r"a.tsv, line 2: more columns than the header has"),
        ("a.csv", "one,two,label\na,b,yes\n", r"a.csv: no usual column of text among one, two, label"),
        ("a.jsonl", '{"text": "a", "label": 1}\n[1]\n', r"a.jsonl, line 2: not a JSON object"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', r"a.jsonl: not valid JSONL"),
        ("a.csv", "text,label\n", r"a.csv holds no row"),
        ("a.parquet", "", r"classification data are .tsv, .csv or .jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_labelled(tmp_path / name, None, "label", need_label=True)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\n\xff\xfe\tyes\n")
    with pytest.raises(InputError, match="a.tsv: not UTF-8 text"):
        read_labelled(tmp_path / "a.tsv", None, "label", need_label=True)


def test_a_part_of_each_label_is_held_out() -> None:
    rows = [LabelledText(f"text {i}", "ab"[i % 4 == 0]) for i in range(400)]
    kept, held_out = split_off(rows, 0.1)
    assert sorted(kept + held_out) == sorted(rows)
    assert sum(row.label == "b" for row in held_out) == 10 and len(held_out) == 40
    assert split_off(list(reversed(rows)), 0.1)[1] == list(reversed(held_out))
    twice = split_off(rows + rows, 0.1)
    assert not set(twice[0]) & set(twice[1])


def test_peft_and_transformers_open_a_classifier_with_equal_logits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = classifier(tiny_checkpoint)
    save_adapter(model, tmp_path)
    rows, _, store = stored(tiny_checkpoint)
    ours = label_log_probabilities(model, store, batch_size=7)

    base = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, num_labels=3, dtype=torch.float32)
    base.config.pad_token_id = 2
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    batch = tokenized(tiny_checkpoint, rows)
    for ids, mask, expected in zip(batch["input_ids"], batch["attention_mask"], ours, strict=True):
        logits = theirs(ids[mask == 1][None]).logits[0]
        assert torch.allclose(logits.log_softmax(-1), expected, atol=2e-5)
    assert torch.allclose(theirs(**batch).logits.log_softmax(-1), ours, atol=2e-5)

    again = load_model(tiny_checkpoint, torch.float32)
    add_classification_head(again, LABELS)
    load_adapter(again, tmp_path)
    assert torch.equal(label_log_probabilities(again, store, batch_size=7), ours)
    with pytest.raises(InputError, match="score is the head of a classifier, and this model has none"):
        load_adapter(load_model(tiny_checkpoint, torch.float32), tmp_path)


def test_loss_and_gradients_are_those_of_transformers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = classifier(tiny_checkpoint)
    save_adapter(model, tmp_path)
    rows, numbers, store = stored(tiny_checkpoint)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, num_labels=3, dtype=torch.float32)
    base.config.pad_token_id = 2
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    batch = tokenized(tiny_checkpoint, rows)
    expected = theirs(**batch, labels=torch.tensor(numbers)).loss
    expected.backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    gradients = {name.replace("modules_to_save.", ""): gradient for name, gradient in gradients.items()}

    for layout in ("packed", "padded"):
        model.zero_grad()
        windows = TrainingWindows(store, 128, seed=0, shuffle=False, examples=layout)
        input_ids, labels, position_ids, document_ids, targets, *_ = collate(
            [windows[i] for i in range(windows.windows_per_epoch)]
        )
        hidden = model.model(input_ids, position_ids, document_ids)
        loss = head_loss(model.lm_head, hidden, labels, reduction="sum", targets=targets) / len(targets)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        own = adapter_parameters(model)
        assert len(own) == len(gradients) == 2 * 14 + 1
        for name, parameter in own.items():
            assert (parameter.grad - gradients[name]).norm() <= 1e-4 * gradients[name].norm() + 1e-9, name


def test_trainable_parameters_of_the_published_recipe() -> None:
    """TinyLlama, LoRA of rank 32 on q and v, two labels: 4,509,696, as the recipe's authors count."""
    from lit_llama.config import LlamaConfig

    with torch.device("meta"):
        model = Llama(LlamaConfig.from_name("tinyllama-1.1b"))
        add_classification_head(model, ["0", "1"])
        inject_lora(model, LoRAConfig(r=32, alpha=64, targets=["q_proj", "v_proj"], modules_to_save=["score"]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 4_509_696
    embedding = 32000 * 2048
    assert total_parameters(model) == 1_100_048_384 - embedding + 2 * 2048
    # 4 a parameter of layers, head and adapter, 2 more for what is trained: the embedding multiplies nothing.
    adapter = 4_509_696 - 4096
    assert training_flops_per_token(model) == 4 * (total_parameters(model) - embedding + adapter) + 2 * 4_509_696


@pytest.mark.parametrize("labels", [2, 5])
def test_scores_are_those_of_scikit_learn(labels: int) -> None:
    random = np.random.default_rng(0)
    names = [f"label {i}" for i in range(labels)]
    for _ in range(30):
        expected, predicted = random.integers(0, labels, (2, 40))
        expected[:labels] = range(labels)
        scores = classification_scores(predicted.tolist(), expected.tolist(), names)
        assert scores["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(expected, predicted))
        assert scores["f1"] == pytest.approx(sklearn.metrics.f1_score(expected, predicted, average="macro"))
        assert scores["matthews"] == pytest.approx(sklearn.metrics.matthews_corrcoef(expected, predicted))
        assert scores["confusion"] == sklearn.metrics.confusion_matrix(expected, predicted).tolist()
    constant = classification_scores([0] * 4, [0, 0, 1, 1], ["a", "b"])
    assert constant["matthews"] == sklearn.metrics.matthews_corrcoef([0, 0, 1, 1], [0] * 4) == 0


def test_a_classifier_is_trained_resumed_and_used(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pairs, out = written(tmp_path, "tsv"), tmp_path / "out"
    options = ("--checkpoint_dir", tiny_checkpoint, "--train_file", pairs, "--val_file", pairs, "--test_file", pairs,
               "--train.global_batch_size", 5, "--train.micro_batch_size", 5, "--train.epochs", 6, "--precision",
               "fp32", "--train.learning_rate", 1e-2, "--eval.interval", 8)  # fmt: skip
    printed = json.loads(run_script("finetune/classify.py", *options, "--out_dir", out).stdout)
    assert printed == json.loads((out / "evaluation.json").read_text())
    report = json.loads((out / "report.json").read_text())
    assert printed["last"]["test"]["accuracy"] == report["after"]["val_accuracy"] > 0.7
    assert "held-out accuracy" in (out / "report.md").read_text()
    options_of_use = ("--checkpoint_dir", tiny_checkpoint, "--adapter_dir", out, "--dtype", "fp32")
    used = run_script("generate/classify.py", *options_of_use, "--file", pairs)
    answers = [json.loads(line) for line in used.stdout.splitlines()]
    right = sum(answer["label"] == answer["expected"] for answer in answers)
    assert right / len(answers) == printed["last"]["test"]["accuracy"]
    assert used.stderr.endswith(f"{right} of 20 expected labels met ({right / 20:.1%})\n")
    again = run_script("finetune/classify.py", *options, "--out_dir", out, "--resume", True)
    assert json.loads(again.stdout)["last"] == printed["last"]

    other = tmp_path / "other.tsv"
    other.write_text("sentence1\tsentence2\tlabel\na\tb\tperhaps\n")
    options = ("--checkpoint_dir", tiny_checkpoint, "--train_file", pairs, "--test_file", other)
    process = run_script("finetune/classify.py", *options, "--out_dir", tmp_path / "no", check=False)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1] == (
        f"error: {other}, row 1: label 'perhaps' does not occur in training (maybe, no, yes)"
    )
    assert not (tmp_path / "no").exists()
