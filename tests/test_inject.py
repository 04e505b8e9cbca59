"""finetune/inject.py and what it stands on: documents, mixed windows, examples as token stores, distillation's loss."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script

from lit_llama.data.mixing import MixedWindows
from lit_llama.data.packing import TrainingWindows, collate
from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError
from lit_llama.injection.distill import DISTILLED, Distill
from lit_llama.injection.interface import (
    ASKED,
    DOCUMENTS,
    QUESTIONS,
    REPLAY,
    UNASKED,
    Document,
    Recipe,
    Resources,
    Stage,
)
from lit_llama.injection.preparation import open_course, prepare_examples, read_documents, read_resources
from lit_llama.injection.recipes import RecipeOptions, check_needs, chosen_recipes, plan_of
from lit_llama.tokenizer import Tokenizer

COUNTRIES = {
    "norway": "Norway lies in Northern Europe. Its capital is Oslo. The highest point of Norway is Galdhopiggen.",
    "brazil": "Brazil lies in South America. Its capital is Brasilia. The highest point of Brazil is Pico da Neblina.",
    "nepal": "Nepal lies in Southern Asia. Its capital is Kathmandu. The highest point of Nepal is Mount Everest.",
    "chad": "Chad lies in Central Africa. Its capital is N'Djamena. The highest point of Chad is Emi Koussi.",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four documents, facts on them with templates, and questions on two of them."""
    for name, text in COUNTRIES.items():
        path = tmp_path / "documents" / text.split(" ")[3].lower() / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    facts, questions = [], []
    for name, text in COUNTRIES.items():
        subject, capital = name.title(), text.split("capital is ")[1].split(".")[0]
        facts.append({"subject": subject, "relation": "capital", "value": capital, "doc_id": name})
        if name in ("norway", "brazil"):
            row = {"id": name, "question": f"What is the capital of {subject}?", "answers": [capital], "doc_id": name}
            questions.append(row)
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "templates.yaml").write_text(
        "capital:\n  questions: ['What is the capital of {subject}?']\n"
        "  statements: ['The capital of {subject} is {value}.', '{value} is the capital of {subject}.']\n"
        "  reversed_questions: ['Of what is {value} the capital?']\n"
    )
    return tmp_path


class Scribe:
    """Writes what the tests need: a question on any part, and an answer that is one of its sentences."""

    identity = "scribe"

    def __init__(self) -> None:
        self.calls = Counter()

    def write(
        self, document: Document, task: str, prompt: str, count: int, seed: int, max_new_tokens: int
    ) -> list[str]:
        self.calls[task] += 1
        subject = document.text.split(" ")[0]
        if task == "question":
            return [f"What city is the capital of {subject}{'?' if self.calls[task] % 2 else ', by the way?'}"] * count
        return [f"The capital of {subject} is {document.text.split('capital is ')[1].split('.')[0]}"] * count

    def write_each(self, pairs: Sequence[tuple[Document, str]], task: str, seed: int, max_new_tokens: int) -> list[str]:
        return [
            self.write(document, task, prompt, 1, seed, max_new_tokens)[0] if document.text else "A frame with beads"
            for document, prompt in pairs
        ]


def recipes_of(names: str) -> list[Recipe]:
    return chosen_recipes(names, RecipeOptions(distill=Distill(questions=2)))


def prepared(folder: Path, checkpoint: Path, names: str, generator: Scribe | None = None) -> Path:
    documents = read_documents([folder / "documents"])
    files = (folder / "facts.jsonl", folder / "templates.yaml", folder / "questions.jsonl")
    resources = read_resources(documents, *files, generator, ["In Rome they count with an Abacus, as in China."])
    prepare_examples(
        recipes_of(names), resources, folder / "examples", checkpoint, style="chatml", system=None, length=256, seed=0,
        cache_dir=folder / "cache", device=torch.device("cpu"), overwrite=False,
    )  # fmt: skip
    return folder / "examples"


def store_of(directory: Path, documents: Sequence[int]) -> TrainingWindows:
    """Windows of 8 pairs over documents of one token each repeated: document n says n, so windows tell their origin."""
    with TokenStoreWriter(directory, 5000, "a" * 64, "here") as writer:
        for number in documents:
            writer.add("train", [number] * 9)
    return TrainingWindows(TokenStore.open(directory, "train"), 8, seed=0)


def test_documents_have_ids_titles_and_headings(tmp_path: Path) -> None:
    (tmp_path / "guide/basics").mkdir(parents=True)
    (tmp_path / "guide/basics/getting_started.md").write_text("# First steps\n\nInstall it.\n")
    (tmp_path / "guide/south_sudan.txt").write_text("A country.\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')
    found = {document.id: document for document in read_documents([tmp_path])}
    assert found.keys() == {"getting_started", "south_sudan", "rows#1", "rows#2"}
    assert found["getting_started"].title == "First steps"
    assert found["getting_started"].headings == ("guide", "basics", "First steps")
    assert found["south_sudan"].title == "South Sudan" and found["south_sudan"].headings == ("guide",)
    (tmp_path / "south_sudan.md").write_text("Again.\n")
    with pytest.raises(InputError, match="south_sudan.*called 'south_sudan' already"):
        read_documents([tmp_path])
    with pytest.raises(InputError, match="no such file"):
        read_documents([tmp_path / "absent"])


def test_mixed_windows_follow_the_plan(tmp_path: Path) -> None:
    sources = {
        "documents": store_of(tmp_path / "documents", range(100, 110)),
        "questions": store_of(tmp_path / "questions", range(200, 203)),
    }
    # 16 windows of questions alone, then 40 windows of which a quarter are questions.
    stages = [(16 * 8, {"questions": 1.0}), (40 * 8, {"questions": 0.25, "documents": 0.75})]
    windows = MixedWindows(sources, stages, seed=0)
    assert windows.windows_by_source == {"documents": 30, "questions": 26}
    seen = [int(windows[index].input_ids[0]) for index in range(windows.windows_per_epoch)]
    assert all(number >= 200 for number in seen[:16])
    assert sum(number >= 200 for number in seen[16:]) == 10
    # Each source is walked through before any of its windows comes again: 30 = 3 x 10, 26 = 8 x 3 + 2.
    assert set(Counter(number for number in seen if number < 200).values()) == {3}
    assert sorted(Counter(number for number in seen if number >= 200).values()) == [8, 9, 9]
    # ... also over the end of the course.
    later = [int(windows[windows.windows_per_epoch + index].input_ids[0]) for index in range(windows.windows_per_epoch)]
    assert sorted(Counter(number for number in seen + later if number >= 200).values()) == [17, 17, 18]
    again = MixedWindows(sources, stages, seed=0)
    assert [int(again[index].input_ids[0]) for index in range(56)] == seen
    assert [int(MixedWindows(sources, stages, seed=1)[index].input_ids[0]) for index in range(56)] != seen
    with pytest.raises(InputError, match="'others'.*only documents, questions"):
        MixedWindows(sources, [(80, {"others": 1.0})], seed=0)


def test_recipes_make_one_plan() -> None:
    assert plan_of(recipes_of("raw")) == [Stage({DOCUMENTS: 1.0})]
    (stage,) = plan_of(recipes_of("views+qa+replay"))
    assert stage.mix == pytest.approx({DOCUMENTS: 0.6 * 0.9, QUESTIONS: 0.4 * 0.9, REPLAY: 0.1})
    first, second, third = plan_of(recipes_of("raw+pit+replay"))
    assert first.mix == pytest.approx({QUESTIONS: 0.9, REPLAY: 0.1})
    assert second.mix == pytest.approx({QUESTIONS: 0.45, ASKED: 0.45, REPLAY: 0.1})
    assert third.mix == pytest.approx({UNASKED: 0.9, REPLAY: 0.1})
    assert first.share + second.share + third.share == pytest.approx(1)
    with pytest.raises(InputError, match="'quotes' is not one of raw, structure"):
        recipes_of("raw+quotes")
    with pytest.raises(InputError, match="raw is named twice"):
        recipes_of("raw+raw")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("views", "needs facts"),
        ("qa", "needs training questions"),
        ("structure", "needs documents in folders"),
        ("paraphrase", "needs a model that writes"),
        ("replay", "needs text of other subjects"),
    ],
)
def test_a_recipe_says_what_it_lacks(name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"the recipe {name} {message}"):
        check_needs(recipes_of(name), Resources([Document("a", "Text.", "A")]))


def test_documents_with_questions_are_told_from_the_others(folder: Path, tiny_checkpoint: Path) -> None:
    directory = prepared(folder, tiny_checkpoint, "raw+pit")
    tokenizer = Tokenizer.from_checkpoint(tiny_checkpoint)
    texts = {}
    for path in (directory / "tokens").iterdir():
        store = TokenStore.open(path, "train", tokenizer.sha256)
        texts[path.name] = [
            tokenizer.decode(store.document(number)[0].tolist()) for number in range(store.num_documents)
        ]
    assert texts.keys() == {ASKED, UNASKED, QUESTIONS}
    assert sorted(texts[ASKED]) == sorted([COUNTRIES["norway"], COUNTRIES["brazil"]])
    assert sorted(texts[UNASKED]) == sorted([COUNTRIES["nepal"], COUNTRIES["chad"]])
    questions = TokenStore.open(directory / "tokens" / QUESTIONS, "train")
    ids, mask = questions.document(0)
    learned = tokenizer.decode([token for token, is_learned in zip(ids.tolist(), mask, strict=True) if is_learned])
    assert learned == "Oslo" or learned == "Brasilia"
    # Views of one document have one number in every store, so that they can be kept apart.
    rows = [json.loads(line) for line in (directory / "examples.jsonl").read_text().splitlines()]
    assert Counter(row["recipe"] for row in rows) == {"raw": 4, "pit": 2}


def test_views_of_a_document_share_no_window(folder: Path, tiny_checkpoint: Path) -> None:
    directory = prepared(folder, tiny_checkpoint, "permute")
    store = TokenStore.open(directory / "tokens" / DOCUMENTS, "train")
    views = Counter(store.groups.tolist())  # three sentences have few orders
    assert views.keys() == {0, 1, 2, 3} and all(2 <= count <= 5 for count in views.values())
    windows = open_course(directory, plan_of(recipes_of("permute")), None, 256, 0, None, 2.0)
    documents = [store.document(number)[0] for number in range(store.num_documents)]
    groups_of = {tuple(ids[:-1].tolist()): group for ids, group in zip(documents, store.groups, strict=True)}
    for index in range(windows.windows_per_epoch):
        window = windows[index]
        segments = [window.input_ids[window.document_ids == i] for i in range(window.document_ids.max() + 1)]
        groups = [groups_of[tuple(segment.tolist())] for segment in segments]
        assert len(groups) == len(set(groups))
    # Two passes over what there is, within a window's rounding.
    assert abs(windows.windows_per_epoch - 2 * TrainingWindows(store, 256, 0).windows_per_epoch) <= 1


def test_examples_are_made_once_and_never_lost(folder: Path, tiny_checkpoint: Path) -> None:
    directory = prepared(folder, tiny_checkpoint, "permute+qa")
    before = (directory / "tokens" / DOCUMENTS / "meta.json").stat().st_mtime_ns
    assert prepared(folder, tiny_checkpoint, "permute+qa") == directory
    assert (directory / "tokens" / DOCUMENTS / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="examples of other documents, recipes or options; pass --overwrite true"):
        prepared(folder, tiny_checkpoint, "permute")


def test_distillation_learns_the_teacher_s_probabilities(folder: Path, tiny_checkpoint: Path) -> None:
    """The loss of a distilled window is the divergence from what transformers' model says with the document."""
    from transformers import LlamaForCausalLM

    from lit_llama.checkpoint import load_model
    from lit_llama.prompts import encode_example
    from lit_llama.training_step import LossOfBatch

    scribe = Scribe()
    directory = prepared(folder, tiny_checkpoint, "distill", scribe)
    calls = scribe.calls.total()
    rows = [json.loads(line) for line in (directory / "examples.jsonl").read_text().splitlines()]
    examples = [row for row in rows if "reason" not in row]
    assert len(examples) == 8 and all(row["teacher_context"] for row in examples)

    tokenizer = Tokenizer.from_checkpoint(tiny_checkpoint)
    store = TokenStore.open(directory / "tokens" / DISTILLED, "train")
    windows = TrainingWindows(store, 256, seed=0, shuffle=False, examples="padded")
    window = windows[0]
    text = tokenizer.decode(store.document(0)[0].tolist())
    example = next(row for row in examples if row["segments"][0][0] in text)
    theirs = LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()

    (question, _), (answer, _) = example["segments"]
    from lit_llama.injection.generator import on_document

    said = [{"role": "user", "content": on_document(example["teacher_context"], question)}]
    ids, mask = encode_example(tokenizer, "chatml", [*said, {"role": "assistant", "content": answer}])
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0]
        expects = logits[[place - 1 for place, learned in enumerate(mask) if learned]]
        top = expects.topk(20)
        # The project's teacher computes in bf16; in fp32 its probabilities are close.
        stored = torch.from_numpy(window.teacher[1])[torch.from_numpy(window.labels) != -100]
        torch.testing.assert_close(stored, top.values.softmax(-1), atol=2e-2, rtol=0.1)

        model = load_model(tiny_checkpoint, torch.float32, torch.device("cpu"))
        batch = collate([window])
        loss = LossOfBatch(model)(*batch)
        student = theirs(batch.input_ids).logits[0][batch.targets].log_softmax(-1)
        target = torch.zeros_like(student).scatter(1, batch.teacher_ids, batch.teacher_probabilities)
        torch.testing.assert_close(loss, F.kl_div(student, target, reduction="sum"), rtol=2e-4, atol=1e-5)

    # Another run takes texts and probabilities from the cache.
    for path in sorted(directory.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    directory.rmdir()
    prepared(folder, tiny_checkpoint, "distill", scribe)
    assert scribe.calls.total() == calls
    assert len(list((folder / "cache").glob("teacher-*.safetensors"))) == 1


def test_labels_and_teachers_share_a_batch(folder: Path, tiny_checkpoint: Path) -> None:
    directory = prepared(folder, tiny_checkpoint, "raw+distill", Scribe())
    stores = {path.name: TokenStore.open(path, "train") for path in (directory / "tokens").iterdir()}
    text = TrainingWindows(stores[DOCUMENTS], 256, seed=0)[0]
    taught = TrainingWindows(stores[DISTILLED], 256, seed=0, examples="packed")[0]
    batch = collate([text, taught])
    plain = collate([text])
    count = len(plain.targets)
    assert batch.teacher_ids.shape == (len(batch.targets), 20)
    assert batch.teacher_ids[:count, 0].tolist() == plain.labels.flatten()[plain.targets].tolist()
    assert batch.teacher_probabilities[:count].sum(1).tolist() == [1.0] * count
    assert torch.allclose(batch.teacher_probabilities.sum(1), torch.ones(len(batch.targets)), atol=1e-2)
    assert plain.teacher_ids.shape == (count, 0)


OPTIONS = (
    "--train.sequence_length", 128, "--train.micro_batch_size", 2, "--train.global_batch_size", 2,
    "--precision", "fp32", "--tokens", 1500, "--accelerator", "cpu", "--train.learning_rate", 1e-3,
    "--eval.interval", 5,
)  # fmt: skip


def inject(folder: Path, checkpoint: Path, recipe: str, out: str, *options: object, check: bool = True):
    common = ("--checkpoint_dir", checkpoint, "--documents", folder / "documents", "--recipe", recipe)
    place = ("--out_dir", folder / out, "--cache_dir", folder / "cache")
    return run_script("finetune/inject.py", *common, *place, *OPTIONS, *options, check=check)


def test_inject_trains_an_adapter_that_says_what_it_is(folder: Path, tiny_checkpoint: Path) -> None:
    facts = ("--facts_file", folder / "facts.jsonl", "--templates_file", folder / "templates.yaml")
    questions = ("--question_file", folder / "questions.jsonl")
    process = inject(
        folder, tiny_checkpoint, "views+qa", "run", *facts, *questions, "--recipes.views.views", 3, "--seed", 1
    )
    assert "4 documents by views+qa" in process.stderr and "views: 12 examples of 4 documents" in process.stderr
    report = json.loads((folder / "run/report.json").read_text())
    assert report["after"]["val_loss"] < report["before"]["val_loss"]
    assert 1200 <= report["tokens"] <= 2600
    assert (folder / "run/adapter_model.safetensors").is_file()
    # Whole again from its own state, and refused without being told to replace it.
    again = inject(folder, tiny_checkpoint, "views+qa", "run", *facts, *questions, check=False)
    assert again.returncode == 2 and "--overwrite" in again.stderr
    answer = run_script(
        "generate/lora.py", "--checkpoint_dir", tiny_checkpoint, "--adapter_dir", folder / "run", "--prompt",
        "What is the capital of Chad?", "--max_new_tokens", 4,
    )  # fmt: skip
    assert answer.returncode == 0


def test_inject_all_weights_and_its_mistakes(folder: Path, tiny_checkpoint: Path) -> None:
    inject(folder, tiny_checkpoint, "raw", "full", "--learner", "full")
    assert (folder / "full/checkpoint/model.safetensors").is_file()
    for recipe, options, message in [
        ("raws", (), "'raws' is not one of"),
        ("qa", (), "needs training questions"),
        ("views", ("--facts_file", folder / "facts.jsonl"), "--facts_file needs --templates_file"),
    ]:
        process = inject(folder, tiny_checkpoint, recipe, "bad", *options, check=False)
        assert process.returncode == 2 and message in process.stderr
        assert process.stderr.strip().count("\n") == 0, process.stderr
        assert not (folder / "bad").exists()


def test_one_document_gives_one_window_a_view(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/only.txt").write_text(COUNTRIES["nepal"])
    views = len({*COUNTRIES["nepal"].split(". ")})
    process = inject(tmp_path, tiny_checkpoint, "permute", "run", "--recipes.permute.views", views)
    store = TokenStore.open(tmp_path / "run-examples/tokens/documents", "train")
    windows = TrainingWindows(store, 128, seed=0)
    assert windows.windows_per_epoch == store.num_documents > 1, process.stderr


def test_rehearsal_learns_what_the_base_would_say_anyway(folder: Path, tiny_checkpoint: Path) -> None:
    from transformers import LlamaForCausalLM

    directory = prepared(folder, tiny_checkpoint, "raw+rehearse", Scribe())
    rows = [json.loads(line) for line in (directory / "examples.jsonl").read_text().splitlines()]
    rehearsed = [row for row in rows if row["recipe"] == "rehearse" and "reason" not in row]
    assert rehearsed and all(row["teacher_context"] == "" for row in rehearsed)
    assert all(any(name in row["segments"][0][0] for name in ("Abacus", "China", "Rome")) for row in rehearsed)
    store = TokenStore.open(directory / "tokens/rehearsed", "train")
    batch = collate([TrainingWindows(store, 256, seed=0, shuffle=False, examples="padded")[0]])
    theirs = LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        top = theirs(batch.input_ids).logits[0][batch.targets].topk(20)
    # No document was read: what is learned is what the base says of itself (its probabilities were taken in bf16).
    torch.testing.assert_close(batch.teacher_probabilities, top.values.softmax(-1), atol=2e-2, rtol=0.1)
    assert plan_of(recipes_of("raw+rehearse"))[0].mix == pytest.approx({DOCUMENTS: 0.85, "rehearsed": 0.15})
