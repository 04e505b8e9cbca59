"""What a model knows: recall and divergence against transformers and PEFT, answers, choices, cells, and the script."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TEXT, run_script
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError
from lit_llama.evaluation.knowledge import (
    NEUTRAL_QUESTION,
    answer_briefly,
    answer_entropy,
    answer_limits,
    cells,
    check_knowledge_questions,
    evaluate_knowledge,
)
from lit_llama.evaluation.questions import encode_choice, encode_questions, wilson_interval
from lit_llama.evaluation.recall import is_switchable, kl_to_base, value_recall, without_adapter
from lit_llama.generation import generate
from lit_llama.injection.interface import Document
from lit_llama.lora import LoRAConfig, inject_lora, save_adapter
from lit_llama.model import Llama
from lit_llama.prompts import encode_prompt
from lit_llama.tokenizer import Tokenizer

DOCUMENTS = [
    Document("norway", "Oslo is the capital of Norway. Oslo lies on a fjord, and Osloers live there.", "Norway"),
    Document("nepal", "Mount Everest, at 8,849 metres, is the highest point of Nepal. " + TEXT, "Nepal"),
    Document("brazil", "Brasilia is the capital of Brazil.", "Brazil"),
]
VALUES = {"norway": ["Oslo", "Bergen"], "nepal": ["8,849 metres", "Mount Everest"], "brazil": ["Brasilia"]}
PLACES = {  # in the documents, found by eye
    "norway": [(0, 4), (31, 35)],
    "nepal": [(18, 30), (0, 13), (63 + 45, 63 + 58), (63 + 93, 63 + 105)],
    "brazil": [(0, 8)],
}


def row(name: str, split: str = "injected", form: str = "direct", phrasing: str = "unseen", **more: Any) -> dict:
    place = {"split": split, "form": form, "phrasing": phrasing, "relation": "capital"}
    return {"id": name, "question": "Capital of Norway?", "answers": ["Oslo"], **place, **more}


QUESTIONS = [
    row("no", doc_id="norway", choices=["Brasilia", "Oslo", "Lima", "Kathmandu"]),
    row("no2", doc_id="norway", phrasing="trained", question="Which city is the capital of Norway?"),
    row(
        "br",
        "never",
        doc_id="brazil",
        question="Capital of Brazil?",
        answers=["Brasilia"],
        choices=["Brasilia", "Oslo"],
    ),
    row("sky", "known", question="Color of the sky?", answers=["blue"], relation="color"),
]


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint after some steps on two of the documents, by transformers: it recalls a part of them."""
    tokenizer = Tokenizer.from_checkpoint(tiny_checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-3)
    for _ in range(30):
        for document in DOCUMENTS[:2]:
            ids = torch.tensor([[0, *tokenizer.encode(document.text)]])
            theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("trained") / "checkpoint"
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    model.load_state_dict(theirs.state_dict())
    save_checkpoint(model, directory, tokenizer_from=tiny_checkpoint)
    return directory


@pytest.fixture(scope="module")
def model(trained: Path) -> Llama:
    return load_model(trained, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def theirs(trained: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(trained: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(trained)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> TokenStore:
    directory = tmp_path_factory.mktemp("general") / "store"
    random = np.random.default_rng(0)
    with TokenStoreWriter(directory, tokenizer.vocab_size, tokenizer.sha256, "test") as writer:
        for length in (50, 1, 33, 70):
            writer.add("val", random.integers(3, 320, length), num_bytes=length)
    return TokenStore.open(directory, "val")


def adapt(directory: Path, **options: Any) -> Llama:
    model = load_model(directory, dtype=torch.float32)
    torch.manual_seed(0)
    inject_lora(model, LoRAConfig(r=4, **options))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("window", [512, 24, 7])
def test_recall_equals_transformers(
    model: Llama, theirs: torch.nn.Module, tokenizer: Tokenizer, trained: Path, window: int
) -> None:
    right = values = tokens = 0
    loss = 0.0
    for document in DOCUMENTS:
        encoding = PreTrainedTokenizerFast.from_pretrained(trained)(document.text, return_offsets_mapping=True)
        ids = [tokenizer.document_start_id, *encoding["input_ids"], tokenizer.document_end_id]
        spans = [(0, 0), *encoding["offset_mapping"], (0, 0)]
        for target in range(1, len(ids)):
            stride = window // 2
            start = max(0, -(-(target - window) // stride) * stride)
            logits = theirs(torch.tensor([ids[start:target]])).logits[0, -1].double()
            loss += F.cross_entropy(logits, torch.tensor(ids[target])).item()
            tokens += 1
            low, high = spans[target]
            if any(low < end and high > begin for begin, end in PLACES[document.id]):
                values += 1
                right += int(logits.argmax() == ids[target])
    found = value_recall(model, tokenizer, DOCUMENTS, VALUES, window, batch_size=2)
    assert 0 < right < values
    assert found == {
        "documents": 3,
        "value_tokens": values,
        "accuracy": right / values,
        "values": 5,
        "values_missing": 1,
        "tokens": tokens,
        "loss": pytest.approx(loss / tokens, rel=1e-5),
        "perplexity": pytest.approx(math.exp(loss / tokens), rel=1e-4),
        "bits_per_byte": pytest.approx(loss / math.log(2) / sum(len(d.text.encode()) for d in DOCUMENTS), rel=1e-5),
    }


def test_recall_without_values(model: Llama, tokenizer: Tokenizer) -> None:
    found = value_recall(model, tokenizer, DOCUMENTS[:1], {})
    assert (found["accuracy"], found["value_tokens"], found["values"]) == (None, 0, 0)
    with pytest.raises(InputError, match="nothing to predict from"):
        value_recall(model, tokenizer, DOCUMENTS, VALUES, window=1)


@pytest.mark.parametrize(
    "options", [{}, {"targets": ["q_proj", "lm_head"]}, {"dora": True}], ids=["all layers", "head", "dora"]
)
def test_divergence_equals_peft(
    trained: Path, theirs: torch.nn.Module, store: TokenStore, tmp_path: Path, options: dict
) -> None:
    model = adapt(trained, **options)
    save_adapter(model, tmp_path)
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32), tmp_path
    )
    total = tokens = 0
    windows = TrainingWindows(store, 32, seed=0, shuffle=False)
    for number in range(windows.windows_per_epoch):
        window = windows[number]
        for document in set(window.document_ids.tolist()):
            here = window.document_ids == document
            targets = torch.from_numpy(window.labels[here] != -100)
            ids = torch.from_numpy(window.input_ids[here])[None]
            with torch.no_grad():
                ours, base = (torch.log_softmax(m(ids).logits[0].double(), -1)[targets] for m in (adapted, theirs))
            total += (base.exp() * (base - ours)).sum().item()
            tokens += int(targets.sum())
    kl = kl_to_base(model, windows, batch_size=3)
    assert kl == pytest.approx(total / tokens, rel=1e-4)
    assert kl > 0.01
    assert kl_to_base(model, windows, base=load_model(trained, dtype=torch.float32)) == pytest.approx(kl, rel=1e-5)
    assert kl_to_base(model, windows, batch_size=1) == pytest.approx(kl, rel=1e-5)  # the adapter is back in its place


def test_a_model_does_not_diverge_from_itself(model: Llama, store: TokenStore) -> None:
    assert kl_to_base(model, TrainingWindows(store, 32, seed=0, shuffle=False), base=model) == 0


def test_the_base_comes_back_only_from_plain_lora(trained: Path, model: Llama) -> None:
    adapted = adapt(trained)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before, base = adapted(ids), model(ids)
        with without_adapter(adapted):
            assert torch.equal(adapted(ids), base)
        assert torch.equal(adapted(ids), before)
    assert not torch.allclose(before, base)
    with_embedding = adapt(trained, modules_to_save=["embed_tokens"])
    assert not is_switchable(with_embedding)
    with pytest.raises(InputError, match="cannot be switched off"), without_adapter(with_embedding):
        pass


def test_answers_end_with_the_line_or_the_limit(
    model: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = encode_questions(tokenizer, QUESTIONS, "chatml")
    expected = [tokenizer.decode(ids).strip() for prompt in prompts for ids in generate(model, prompt, 6)]
    limits = [6, 6, 3, 6]
    expected[2] = tokenizer.decode(generate(model, prompts[2], 3)[0]).strip()
    expected = [text.split("\n")[0] for text in expected]
    assert any(expected)
    for batch_size in (1, 3):
        assert answer_briefly(model, tokenizer, prompts, limits, "chatml", batch_size) == expected
    seen = {}
    monkeypatch.setattr(
        "lit_llama.evaluation.knowledge.stream_text",
        lambda *arguments, stop: seen.update(stop=stop) or iter([(0, " Os"), (0, "lo ")]),
    )
    assert answer_briefly(model, tokenizer, prompts[:1], [4], "chatml") == ["Oslo"]
    assert "\n" in seen["stop"]


def test_limits_are_of_the_relation(tokenizer: Tokenizer) -> None:
    lengths = {text: len(tokenizer.encode(text)) for text in ("Oslo", "Brasilia", "blue")}
    longest = max(lengths["Oslo"], lengths["Brasilia"])
    limits = answer_limits(tokenizer, "chatml", QUESTIONS)
    assert limits == [longest + 8] * 3 + [lengths["blue"] + 8]
    reversed_row = row("r", form="reversed", answers=["Norway, long known under other names"])
    assert answer_limits(tokenizer, "chatml", [*QUESTIONS, reversed_row])[:4] == limits


def test_confidence_and_choices_equal_transformers(model: Llama, theirs: torch.nn.Module, tokenizer: Tokenizer) -> None:
    prompts = encode_questions(tokenizer, QUESTIONS, "chatml")
    shown: list[tuple[int, int]] = []
    rows = evaluate_knowledge(
        model, tokenizer, QUESTIONS, prompts, "chatml", batch_size=3, progress=lambda *step: shown.append(step)
    )
    assert shown[-1] == (4, 4)
    assert [found["id"] for found in rows] == [question["id"] for question in QUESTIONS]

    def distributions(prompt: list[int], ending: list[int]) -> torch.Tensor:
        logits = theirs(torch.tensor([prompt + ending])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits.double(), dim=-1)

    def likelihood(prompt: list[int], ending: list[int]) -> float:
        return distributions(prompt, ending)[range(len(ending)), ending].sum().item()

    assert any(found["answer"] for found in rows)
    neutral = encode_prompt(tokenizer, "chatml", NEUTRAL_QUESTION)
    for question, prompt, found in zip(QUESTIONS, prompts, rows, strict=True):
        said = encode_choice(tokenizer, "chatml", found["answer"]) or [0]
        logs = distributions(prompt, said)
        assert found["max_probability"] == pytest.approx(logs.exp().amax(dim=-1).mean().item(), rel=1e-4)
        assert found["entropy"] == pytest.approx(-(logs * logs.exp()).sum(dim=-1).mean().item(), rel=1e-4)
        if "choices" not in question:
            assert "choice" not in found
            continue
        endings = [encode_choice(tokenizer, "chatml", text) for text in question["choices"]]
        raw = [likelihood(prompt, ending) for ending in endings]
        scores = {
            "log_likelihood": raw,
            "per_token": [score / len(ending) for score, ending in zip(raw, endings, strict=True)],
            "pmi": [score - likelihood(neutral, ending) for score, ending in zip(raw, endings, strict=True)],
        }
        gold = question["choices"].index(question["answers"][0])
        assert found["choice"] == {name: float(np.argmax(of) == gold) for name, of in scores.items()}


def test_an_empty_answer_has_the_confidence_of_its_end(
    model: Llama, theirs: torch.nn.Module, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_llama.evaluation.knowledge.stream_text", lambda *_, **__: iter(()))
    prompts = encode_questions(tokenizer, QUESTIONS[1:2], "chatml")
    (found,) = evaluate_knowledge(model, tokenizer, QUESTIONS[1:2], prompts, "chatml")
    logs = torch.log_softmax(theirs(torch.tensor(prompts)).logits[0, -1].double(), dim=-1)
    assert (found["answer"], found["exact_match"]) == ("", 0)
    assert found["entropy"] == pytest.approx(-(logs * logs.exp()).sum().item(), rel=1e-4)


def scored(name: str, exact_match: float, fact: str, doc_id: str, **more: Any) -> dict:
    scores = {"exact_match": exact_match, "f1": exact_match, "contains": 1.0, "max_probability": 0.5, "entropy": 2.0}
    return row(name, fact_id=fact, doc_id=doc_id, answer="x", **scores, **more)


def test_cells_by_hand() -> None:
    rows = [
        scored("1", 1.0, "a", "norway", choice={"log_likelihood": 1.0, "per_token": 0.0, "pmi": 1.0}),
        scored("2", 0.0, "a", "norway", choice={"log_likelihood": 0.0, "per_token": 0.0, "pmi": 1.0}),
        scored("3", 1.0, "b", "norway"),
        scored("4", 1.0, "c", "nepal", in_context=0.0),
        scored("5", 1.0, "a", "norway", phrasing="trained"),
        scored("6", 0.0, "d", "brazil", split="never", form="reversed"),
    ]
    found = cells(rows)
    assert {split: list(of_split) for split, of_split in found.items()} == {
        "injected": ["direct/trained", "direct/unseen"],
        "never": ["reversed/unseen"],
    }
    cell = found["injected"]["direct/unseen"]
    assert (cell["count"], cell["entities"], cell["exact_match"], cell["contains"]) == (4, 2, 0.75, 1)
    assert cell["interval"] == {"exact_match": wilson_interval(1.5, 2), "contains": wilson_interval(2, 2)}
    assert cell["choice"] == {"log_likelihood": 0.5, "per_token": 0, "pmi": 1}
    assert (cell["max_probability"], cell["entropy"], cell["in_context"]) == (0.5, 2, 0)
    assert cell["worst_wording"]["exact_match"] == pytest.approx(2 / 3)  # facts: 0, 1, 1
    assert cell["paraphrase_gap"]["exact_match"] == pytest.approx(0.5 / 3)  # (1 + 0) / 2 - 0, then 0, 0
    assert "worst_wording" not in found["injected"]["direct/trained"]
    assert found["never"]["reversed/unseen"]["interval"]["exact_match"] == wilson_interval(0, 1)


def test_answer_entropy_by_hand() -> None:
    answers = ["Oslo", "The Oslo.", "Rome", "Bern"]
    rows = [{**row(str(i)), "answer": text} for i, text in enumerate(answers)]  # 1.5 bits
    rows += [{**row(f"r{i}", relation="river"), "answer": "Rhine"} for i in range(4)]  # 0 bits
    rows += [{**row(f"n{i}", "never"), "answer": text} for i, text in enumerate(("a1", "b1"))]
    assert answer_entropy(rows, lambda one: one["answer"]) == {"injected": pytest.approx(0.75), "never": 1}
    assert answer_entropy(rows, lambda one: one["answers"][0]) == {"injected": 0, "never": 0}


def test_rows_that_cannot_be_sorted() -> None:
    check_knowledge_questions(QUESTIONS, "q.jsonl")
    with pytest.raises(InputError, match="q.jsonl, question 'x': no \"split\""):
        check_knowledge_questions([{"id": "x", "question": "Why?", "answers": ["so"]}], "q.jsonl")
    with pytest.raises(InputError, match="document 'norway' is of the splits 'injected' and 'never'"):
        check_knowledge_questions([*QUESTIONS, row("y", "never", doc_id="norway")], "q.jsonl")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A directory with documents, questions, facts and an adapter."""
    directory = tmp_path_factory.mktemp("inputs")
    (directory / "documents").mkdir()
    for document in DOCUMENTS:
        (directory / "documents" / f"{document.id}.txt").write_text(document.text)
    (directory / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    fact = {"subject": "Norway", "relation": "capital", "value": "Oslo", "doc_id": "norway"}
    (directory / "facts.jsonl").write_text(json.dumps(fact) + "\n")
    save_adapter(adapt(trained), directory / "adapter")
    return directory


def test_script_measures_an_adapter(trained: Path, inputs: Path, store: TokenStore, tokenizer: Tokenizer) -> None:
    out = inputs / "adapter.json"
    process = run_script(
        "scripts/evaluate_knowledge.py",
        *("--checkpoint_dir", trained, "--adapter_dir", inputs / "adapter", "--dtype", "fp32", "--device", "cpu"),
        *("--question_file", inputs / "questions.jsonl", "--documents", inputs / "documents", "--out", out),
        *("--data_dirs", f"{{general: {store.data_dir}}}", "--sequence_length", 32),
    )
    result = json.loads(out.read_text())
    assert "| injected | direct/unseen | 1 |" in process.stdout
    assert "answered by the base: 1 of 1" in process.stderr
    model = adapt(trained).eval()
    windows = TrainingWindows(store, 32, seed=0, shuffle=False)
    assert result["kl_to_base"] == pytest.approx(kl_to_base(model, windows), rel=1e-5)
    assert result["texts"]["general"]["tokens"] == 150
    own = value_recall(model, tokenizer, DOCUMENTS[:1], {"norway": ["Oslo"]}, 32)
    assert result["recall"]["injected"] == pytest.approx(own, rel=1e-5)
    assert list(result["recall"]) == ["injected", "never"]
    assert result["locality"]["count"] == 1
    rows = evaluate_knowledge(model, tokenizer, QUESTIONS, encode_questions(tokenizer, QUESTIONS, "chatml"), "chatml")
    assert [found["answer"] for found in result["rows"]] == [found["answer"] for found in rows]
    assert result["cells"]["injected"]["direct/trained"]["count"] == 1
    assert result["settings"]["context"] == "none"
    assert {"seconds", "peak_memory_gb", "hardware", "versions", "answer_entropy"} <= result.keys()


def test_script_asks_with_the_document_before_it(trained: Path, inputs: Path) -> None:
    process = run_script(
        "scripts/evaluate_knowledge.py",
        *("--checkpoint_dir", trained, "--base_dir", trained, "--question_file", inputs / "questions.jsonl"),
        *("--documents", inputs / "documents", "--context", "oracle", "--passage_words", 12, "--device", "cpu"),
    )
    result = json.loads(process.stdout)
    assert [found["passages"] for found in result["rows"]] == [["norway"] * 2, ["norway"] * 2, ["brazil"], []]
    assert [found["in_context"] for found in result["rows"]] == [1, 1, 1, 0]
    assert "1 of 4 questions have no passage" in process.stderr
    assert (result["recall"], result["kl_to_base"]) == ({}, None)
    assert result["locality"] == {"count": 1, "agreement": 1}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_knowledge", ROOT / "scripts/evaluate_knowledge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_takes_the_values_of_facts(
    script: ModuleType, trained: Path, inputs: Path, capsys: pytest.CaptureFixture
) -> None:
    script.main(
        checkpoint_dir=trained,
        question_file=inputs / "questions.jsonl",
        documents=inputs / "documents",
        facts_file=inputs / "facts.jsonl",
        device="cpu",
    )
    recall = json.loads(capsys.readouterr().out)["recall"]
    assert {split: found["values"] for split, found in recall.items()} == {"injected": 1, "never": 0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context": "bm25", "documents": None}, "--context bm25 needs --documents"),
        ({"base_dir": Path("b"), "adapter_dir": Path("a")}, "--base_dir is for a fully trained checkpoint"),
        ({"top_k": 0}, "--top_k 0 must be at least 1"),
        ({"sequence_length": 4096}, "longer than the model's context of 512"),
        ({"context": "oracle", "passage_words": 400, "documents": ROOT / "README.md"}, None),
    ],
)
def test_script_refuses(script: ModuleType, trained: Path, inputs: Path, change: dict, message: str | None) -> None:
    arguments = {"question_file": inputs / "questions.jsonl", "documents": inputs / "documents", "device": "cpu"}
    if message is None:  # the document is longer than the context
        question = row("long", doc_id="README")
        (inputs / "long.jsonl").write_text(json.dumps(question) + "\n")
        arguments["question_file"], message = inputs / "long.jsonl", "exceeds|leaves no room"
    with pytest.raises(InputError, match=message):
        script.main(checkpoint_dir=trained, **{**arguments, **change})
