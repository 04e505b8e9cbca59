"""Perplexity and question scores against transformers, torchmetrics, published figures and cases worked out by hand."""

import json
import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from conftest import ROOT, TEXT
from rouge_score import rouge_scorer
from torchmetrics.functional.text import squad
from transformers import AutoModelForCausalLM

from lit_llama.checkpoint import load_model
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError
from lit_llama.evaluation import questions as questions_module
from lit_llama.evaluation.likelihood import Likelihood, continuation_likelihoods
from lit_llama.evaluation.perplexity import evaluate_loss, store_of_texts
from lit_llama.evaluation.questions import (
    encode_choice,
    encode_questions,
    evaluate_answers,
    evaluate_choices,
    normalize_answer,
    read_questions,
    score_answer,
    wilson_interval,
)
from lit_llama.generation import generate
from lit_llama.model import Llama
from lit_llama.prompts import encode_chat, encode_prompt
from lit_llama.tokenizer import Tokenizer

LENGTHS = (60, 1, 7, 33, 2, 90)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Llama:
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    torch.manual_seed(1)
    for parameter in model.parameters():  # a model that is sure of itself, so that losses differ from ln(vocabulary)
        if parameter.ndim == 2:
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def theirs(model: Llama, tiny_checkpoint: Path) -> torch.nn.Module:
    theirs = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    theirs.load_state_dict(model.state_dict())
    return theirs.requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(tiny_checkpoint)


def write_store(data_dir: Path, num_bytes: int = 0, mask: bool = False) -> TokenStore:
    generator = np.random.default_rng(3)
    with TokenStoreWriter(data_dir, 320, "a" * 64, "test") as writer:
        for length in LENGTHS:
            learn = generator.integers(0, 2, length) if mask else None
            writer.add("val", generator.integers(0, 320, length), learn, num_bytes=num_bytes)
    return TokenStore.open(data_dir, "val")


def windows_of(store: TokenStore, length: int) -> TrainingWindows:
    return TrainingWindows(store, length, seed=0, shuffle=False)


def test_loss_equals_transformers_over_whole_documents(model: Llama, theirs: torch.nn.Module, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", num_bytes=100)
    losses = []
    for i in range(store.num_documents):
        tokens = torch.from_numpy(store.document(i)[0].astype(np.int64))
        losses += F.cross_entropy(theirs(tokens[None]).logits[0, :-1], tokens[1:], reduction="none").tolist()
    result = evaluate_loss(model, windows_of(store, 256), batch_size=1)
    assert result.tokens == len(losses) == sum(LENGTHS) - len(LENGTHS)
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / (100 * len(LENGTHS)), rel=1e-6)


@pytest.mark.parametrize("mask", [False, True])
def test_loss_equals_transformers_over_the_pieces_that_windows_cut(
    model: Llama, theirs: torch.nn.Module, tmp_path: Path, mask: bool
) -> None:
    store = write_store(tmp_path / "store", num_bytes=100, mask=mask)
    windows = windows_of(store, 40)
    losses = []
    for i in range(windows.windows_per_epoch):
        window = windows[i]
        for segment in range(window.document_ids.max() + 1):
            ids, labels = (
                torch.from_numpy(field[window.document_ids == segment]) for field in (window.input_ids, window.labels)
            )
            losses += F.cross_entropy(theirs(ids[None]).logits[0], labels, reduction="none")[labels != -100].tolist()
    results = [evaluate_loss(model, windows, batch_size) for batch_size in (1, 3, 100)]
    for result in results:
        assert result.tokens == len(losses)
        assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        # Bytes are those of the whole text: with some tokens not scored, bits a byte would mean nothing.
        assert (result.bits_per_byte is None) == mask


def test_uniform_model_has_the_perplexity_of_its_vocabulary(model: Llama, tmp_path: Path) -> None:
    uniform = Llama(model.config)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    result = evaluate_loss(uniform, windows_of(write_store(tmp_path / "store"), 16))
    assert result.perplexity == pytest.approx(320, rel=1e-6)
    assert result.bits_per_byte is None  # the store does not know its bytes


def test_a_part_of_the_windows_is_spread_over_the_store(model: Llama, tmp_path: Path) -> None:
    windows = windows_of(write_store(tmp_path / "store"), 10)
    assert windows.windows_per_epoch == 19
    read = []

    class Recording:
        windows_per_epoch, bytes_per_target = windows.windows_per_epoch, windows.bytes_per_target

        def __getitem__(self, index: int) -> object:
            read.append(index)
            return windows[index]

    calls = []
    part = evaluate_loss(model, Recording(), 2, max_windows=3, progress=lambda *counts: calls.append(counts))
    assert read == [0, 6, 12]
    assert calls == [(2, 3), (3, 3)]
    assert part.tokens == 30
    assert evaluate_loss(model, windows, max_windows=1000) == evaluate_loss(model, windows)


def test_the_mode_of_the_model_is_put_back(model: Llama, tmp_path: Path) -> None:
    windows = windows_of(write_store(tmp_path / "store"), 10)
    modes = []
    handle = model.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    for training in (True, False):
        model.train(training)
        evaluate_loss(model, windows)
        assert model.training is training
    handle.remove()
    assert not any(modes)


def test_texts_are_scored_like_a_store_made_of_them(model: Llama, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["Oslo is the capital of Norway.", "Grüße aus Zürich 😀"]
    with TokenStoreWriter(tmp_path / "store", tokenizer.vocab_size, tokenizer.sha256, "test") as writer:
        for text in texts:
            ids = [tokenizer.document_start_id, *tokenizer.encode(text), tokenizer.document_end_id]
            writer.add("val", [i for i in ids if i is not None], num_bytes=len(text.encode()))
    expected = evaluate_loss(model, windows_of(TokenStore.open(tmp_path / "store", "val"), 32))
    result = evaluate_loss(model, windows_of(store_of_texts(texts, tokenizer, "texts"), 32))
    assert result == expected
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / math.log(2) / 54)
    with pytest.raises(InputError, match="empty.txt: no text to score"):
        store_of_texts([" \n"], tokenizer, "empty.txt")


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("an apple a day", "apple day"),
        ("Theatre of another era", "theatre of another era"),
        ("U.S.A.", "usa"),
        ("8,849 m", "8849 m"),
        (" a\tb\nc ", "b c"),
        (".no", "no"),
        ("a.", ""),
        ("Côte d'Ivoire", "côte divoire"),
    ],
)
def test_normalisation_of_squad(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("answer", "golds", "exact_match", "f1", "contains"),
    [
        ("Mount Everest", ["mount everest"], 1, 1, 1),
        ("The capital of Norway is Oslo.", ["Oslo"], 0, 2 * (1 / 5) / (1 / 5 + 1), 1),
        ("Oslo", ["The city of Oslo"], 0, 2 * 1 * (1 / 3) / (1 + 1 / 3), 0),
        ("Everest Mount", ["Mount Everest"], 0, 1, 0),
        ("Norway", [".no"], 0, 0, 0),
        ("its code is .no", [".no"], 0, 2 * (1 / 4) / (1 / 4 + 1), 1),
        ("25,148 km", ["25148 kilometres", "25 148 km"], 0, 0.5, 0),
        ("25,148 km", ["25148 kilometres", "25148 km"], 1, 1, 1),
        ("", ["Oslo"], 0, 0, 0),
        ("the", ["a"], 1, 1, 0),
        ("to be or not to be", ["be be be"], 0, 2 * (2 / 6) * (2 / 3) / (2 / 6 + 2 / 3), 0),
    ],
)
def test_scores_worked_out_by_hand(answer: str, golds: list[str], exact_match: int, f1: float, contains: int) -> None:
    scores = score_answer(answer, golds)
    del scores["rouge_l"]
    assert scores == pytest.approx({"exact_match": exact_match, "f1": f1, "contains": contains})


def test_scores_equal_torchmetrics() -> None:
    words = ["The", "a", "an", "Oslo,", "oslo", "Mount", "Everest", "of", "8,849", "m.", "--", "Ünder"]
    draw = random.Random(0)
    for _ in range(200):
        answer, *golds = (" ".join(draw.choices(words, k=draw.randint(1, 5))) for _ in range(draw.randint(2, 4)))
        expected = squad(
            {"prediction_text": answer, "id": "1"},
            {"answers": {"answer_start": [0] * len(golds), "text": golds}, "id": "1"},
        )
        scores = score_answer(answer, golds)
        assert 100 * scores["exact_match"] == pytest.approx(expected["exact_match"].item(), abs=1e-4)
        assert 100 * scores["f1"] == pytest.approx(expected["f1"].item(), abs=1e-4)


# The example of Lin 2004, section 3.2, whose reference is "police killed the gunman".
@pytest.mark.parametrize(("answer", "rouge_l"), [("Police kill the gunman.", 3 / 4), ("the gunman kill police", 2 / 4)])
def test_rouge_l_as_published(answer: str, rouge_l: float) -> None:
    assert score_answer(answer, ["police killed the gunman"])["rouge_l"] == rouge_l


def test_rouge_l_equals_googles_package() -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    words = ["The", "a", "Oslo,", "oslo", "8,849", "m.", "--", "Ünder", "İ", "_x_", "e", "o'clock", "\n", "ﬁn"]
    draw = random.Random(0)
    made = [" ".join(draw.choices(words, k=draw.choice((0, 1, 5, 30, 64, 65, 200)))) for _ in range(200)]
    written = [part for path in sorted((ROOT / "howto").glob("*.md")) for part in path.read_text().split("\n\n")]
    for texts in (made, written):
        for _ in range(150):
            answer, *golds = draw.choices(texts, k=draw.randint(2, 4))
            expected = max(scorer.score(gold, answer)["rougeL"].fmeasure for gold in golds)
            assert score_answer(answer, golds)["rouge_l"] == pytest.approx(expected, rel=1e-12)


def test_rouge_l_of_long_answers_takes_no_time() -> None:
    draw = random.Random(0)
    answer, gold = (" ".join(f"w{draw.randrange(500)}" for _ in range(5000)) for _ in range(2))
    start = time.process_time()
    assert 0 < score_answer(answer, [gold])["rouge_l"] < 1
    assert time.process_time() - start < 1  # 25 million cells of a table, in Python, take several


# Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3 (Wilson's score without continuity correction).
@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (7, 7, 0.6457, 1),
    ],
)
def test_wilson_interval_as_published(successes: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_ends_at_0_and_1_exactly() -> None:
    assert all(wilson_interval(0, count)[0] == 0 and wilson_interval(count, count)[1] == 1 for count in range(1, 100))


QUESTIONS = [
    {
        "id": "1",
        "question": "What is the capital of Norway?",
        "answers": ["Oslo"],
        "field": "capital",
        "split": "trained",
    },
    {"id": "2", "question": "Of Brazil?", "answers": ["Brasília", "Brasilia"], "field": "capital", "split": "heldout"},
    {"id": "3", "question": "The highest point of Nepal?", "answers": ["Mount Everest"], "field": "highest_point"},
]


def test_answers_are_scored_and_grouped(model: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = {
        "What is the capital of Norway?": "Oslo.",
        "Of Brazil?": "It is Brasilia, I think",
        "The highest point of Nepal?": "K2",
    }
    asked = []

    def answer_questions(given_model, given_tokenizer, texts, style, max_new_tokens, batch_size, system):
        assert (given_model, given_tokenizer, style, max_new_tokens, system) == (model, tokenizer, "chatml", 7, "S")
        asked.append(list(texts))
        return [scripted[text] for text in texts]

    monkeypatch.setattr(questions_module, "answer_questions", answer_questions)
    result = evaluate_answers(model, tokenizer, QUESTIONS, "chatml", max_new_tokens=7, batch_size=2, system="S")
    assert [len(batch) for batch in asked] == [2, 1]
    f1 = 2 * (1 / 5) / (1 / 5 + 1)
    assert (result["count"], result["exact_match"], result["contains"]) == (3, 1 / 3, 2 / 3)
    assert result["f1"] == pytest.approx((1 + f1) / 3)
    assert result["interval"]["contains"] == wilson_interval(2, 3)
    assert {name: group["contains"] for name, group in result["by_field"].items()} == {"capital": 1, "highest_point": 0}
    assert result["by_field"]["capital"]["exact_match"] == 0.5
    assert {name: group["count"] for name, group in result["by_split"].items()} == {"trained": 1, "heldout": 1}
    assert result["rouge_l"] == pytest.approx((1 + 2 / 6) / 3)
    assert result["rows"][1] == {
        **QUESTIONS[1],
        "answer": "It is Brasilia, I think",
        "exact_match": 0,
        "f1": pytest.approx(f1),
        "contains": 1,
        "rouge_l": pytest.approx(2 / 6),
    }
    assert json.loads(json.dumps(result))["count"] == 3


CHOICES = [
    {"id": 1, "question": "What is the capital of Norway?", "answers": ["Oslo"], "choices": ["Oslo", "Stockholm", "O"]},
    {"id": 2, "question": "?", "answers": ["yes"], "choices": ["no", "yes, of course it is", "perhaps", "yes"]},
    {
        "id": 3,
        "question": "Which mountain of Nepal is the highest?",
        "answers": ["Mount Everest"],
        "choices": ["K2", "Mount Everest"],
    },
]


def test_likelihoods_of_choices_equal_transformers(model: Llama, theirs: torch.nn.Module, tokenizer: Tokenizer) -> None:
    prompts = [encode_prompt(tokenizer, "chatml", question["question"]) for question in CHOICES]
    endings = [[tokenizer.encode(text) for text in question["choices"]] for question in CHOICES]
    endings[1].append(generate(model, prompts[1], 5)[0])
    together = continuation_likelihoods(model, prompts, endings)
    for prompt, choices, results in zip(prompts, endings, together, strict=True):
        for choice, result in zip(choices, results, strict=True):
            likelihoods = theirs(torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
            places = torch.arange(len(prompt) - 1, len(prompt) + len(choice) - 1)
            assert result.tokens == len(choice)
            assert result.log_likelihood == pytest.approx(likelihoods[places, choice].sum().item(), rel=1e-5)
            assert result.greedy == (likelihoods[places].argmax(-1).tolist() == choice)
    assert together[1][-1].greedy and not together[0][0].greedy


CONVERSATION = [
    {"role": "user", "content": "What is the capital of Norway?"},
    {"role": "assistant", "content": "Oslo"},
    {"role": "user", "content": "And of Brazil?"},
]


def test_a_conversation_is_asked_as_a_whole(model: Llama, tokenizer: Tokenizer) -> None:
    row = {"id": 1, "question": "And of Brazil?", "answers": ["yes"], "choices": ["no", "yes"]}
    brief = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    asked = [row | {"messages": CONVERSATION}, row, row | {"messages": brief}]
    system = {"role": "system", "content": "Hi."}
    expected = [[system, *CONVERSATION], [system, CONVERSATION[2]], brief]
    prompts = [encode_chat(tokenizer, "chatml", messages) for messages in expected]
    assert encode_questions(tokenizer, asked, "chatml", "Hi.") == prompts
    answers = [tokenizer.decode(generate(model, ids, 8, stop_ids=tokenizer.stop_ids)[0]).strip() for ids in prompts]
    result = evaluate_answers(model, tokenizer, asked, "chatml", max_new_tokens=8, system="Hi.")
    assert [row["answer"] for row in result["rows"]] == answers
    likelihoods = continuation_likelihoods(model, prompts, [[tokenizer.encode("no"), tokenizer.encode("yes")]] * 3)
    result = evaluate_choices(model, tokenizer, asked, "chatml", system="Hi.")
    for row, expected in zip(result["rows"], likelihoods, strict=True):
        assert row["scores"]["log_likelihood"] == [choice.log_likelihood for choice in expected]


def test_a_question_that_the_style_has_no_form_for_is_named(tokenizer: Tokenizer) -> None:
    rows = [{"id": "a", "question": "A?"}, {"id": "b", "question": "B?", "messages": CONVERSATION[1:]}]
    with pytest.raises(InputError, match="question 'b': turn 0: in prompt style alpaca"):
        encode_questions(tokenizer, rows, "alpaca")


BYTE_LEVEL = [("byte-level", style) for style in ("alpaca", "llama2", "tinyllama", "chatml")]
SENTENCEPIECE = [("sentencepiece", style) for style in ("alpaca", "llama2", "mistral", "mistral-v3", "tinyllama")]


@pytest.mark.parametrize(("kind", "style"), BYTE_LEVEL + SENTENCEPIECE)
def test_choices_are_encoded_as_the_answers_of_a_conversation(
    kind: str, style: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    if kind == "sentencepiece":
        (tmp_path / "text.txt").write_text("\n".join([TEXT] * 3))
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text.txt"),
            model_prefix=str(tmp_path / "tokenizer"),
            vocab_size=330,
            model_type="bpe",
            byte_fallback=True,
            control_symbols=["[INST]", "[/INST]"],
            minloglevel=2,
        )
        controls = {number: {"content": text, "special": True} for number, text in ((3, "[INST]"), (4, "[/INST]"))}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": controls}))
        tokenizer = Tokenizer.from_checkpoint(tmp_path)
    prompt = encode_prompt(tokenizer, style, "Where?")
    answer = encode_choice(tokenizer, style, "the Amazon")
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "the Amazon"}]
    conversation = encode_chat(tokenizer, style, turns, add_generation_prompt=False)
    assert conversation[: len(prompt) + len(answer)] == prompt + answer
    assert len(conversation) - len(prompt) - len(answer) <= 2  # what ends the turn


def test_choices_are_weighed_in_three_ways(model: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Raw, "O" and "no" win; by tokens "Stockholm" and "yes, of course it is"; by bytes whatever the division says.
    figures = [
        [(-4.0, 2), (-5.0, 5), (-3.0, 1)],
        [(-2.0, 1), (-10.0, 10), (-8.0, 2), (-3.0, 1)],
        [(-2.0, 1), (-3.0, 4)],
    ]
    likelihoods = [[Likelihood(*figure, greedy=False) for figure in row] for row in figures]
    monkeypatch.setattr(questions_module, "continuation_likelihoods", lambda *_: likelihoods)
    result = evaluate_choices(model, tokenizer, CHOICES, "chatml")
    correct = {name: [row[name] for row in result["rows"]] for name in ("log_likelihood", "per_token", "per_byte")}
    assert correct == {"log_likelihood": [0, 0, 0], "per_token": [0, 0, 1], "per_byte": [0, 0, 1]}
    assert result["rows"][0]["scores"]["per_token"] == [-2, -1, -3]
    assert result["rows"][0]["scores"]["per_byte"] == pytest.approx([-4 / 4, -5 / 9, -3])
    assert result["rows"][1]["right"] == [3]
    assert result["per_token"] == pytest.approx(1 / 3)
    assert result["interval"]["per_token"] == wilson_interval(1, 3)


def write_questions(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_question_file(tmp_path: Path) -> None:
    rows = read_questions(write_questions(tmp_path / "q.jsonl", *QUESTIONS, *CHOICES))
    assert rows == [*QUESTIONS, *CHOICES]
    [row] = read_questions(write_questions(tmp_path / "q.jsonl", {"question": "Q", "answers": ["A"]}))
    assert row["id"] == "question-1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, 'question 2: "question" must be'),
        ({"question": None}, 'question 2: "question" must be'),
        ({"answers": []}, 'question 2: "answers" must be'),
        ({"answers": "Oslo"}, 'question 2: "answers" must be'),
        ({"answers": ["Oslo", 5]}, 'question 2: "answers" must be'),
        ({"messages": []}, 'question 2: "messages" must be'),
        ({"messages": "Where?"}, 'question 2: "messages" must be'),
        ({"messages": ["Where?"]}, 'question 2: "messages" must be'),
        ({"messages": CONVERSATION[:2]}, 'question 2: "messages" must be'),
        ({"messages": [{"role": "user"}]}, 'question 2: "messages" must be'),
        ({"messages": [{"role": "user", "content": "A", "input": 3}]}, 'question 2: "messages" must be'),
        ({"messages": [{"role": "robot", "content": "A"}]}, 'question 2: "messages" must be'),
        ({"choices": ["Oslo"]}, 'question 2: "choices" must be'),
        ({"choices": ["Bergen", "Narvik"]}, "question 2: none of the choices"),
        ({"id": [1]}, 'question 2: "id" must be'),
        ({"id": "2"}, "question 2: the id '2' is taken"),
    ],
)
def test_wrong_question_files(tmp_path: Path, change: dict, message: str) -> None:
    path = write_questions(tmp_path / "q.jsonl", QUESTIONS[1], QUESTIONS[0] | change)
    with pytest.raises(InputError, match=message) as error:
        read_questions(path)
    assert str(path) in str(error.value)


def test_empty_question_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no question"):
        read_questions(write_questions(tmp_path / "q.jsonl"))
