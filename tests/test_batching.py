"""The engine against one request at a time, transformers' probabilities, and what guesses must not change."""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import write_adapters
from scipy.stats import chisquare

from lit_llama.adapters import load_directory
from lit_llama.batching import Engine, Full, Piece, Request
from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.choices import ChoiceTree
from lit_llama.config import LlamaConfig
from lit_llama.drafting import DraftModel, check_vocabulary, look_up
from lit_llama.errors import InputError, RunError
from lit_llama.generation import GREEDY, SamplingConfig, generate, prepare_to_generate, stream_text
from lit_llama.lora_tree import LoRATreeConfig, inject_lora_tree
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer

SYSTEM = "You know mountains and rivers of every country, and you answer in a few words."
QUESTIONS = [
    "What is the highest point of Norway?", "Capital?", "Which river is the longest of all?", "And of Brazil?",
    "Name a lake.", "Who borders Chile, and where does the border lie?", "How long is the coast?", "Why?",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with larger weights, so that it says different things to different prompts."""
    config = LlamaConfig.from_json(tiny_checkpoint)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = Llama(config)
    model.initialize_(std=0.15)
    directory = tmp_path_factory.mktemp("checkpoint") / "lively"
    save_checkpoint(model, directory, tokenizer_from=tiny_checkpoint)
    return directory


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters that change what is said."""
    return write_adapters(checkpoint, tmp_path_factory.mktemp("adapters"), "lakes", "rivers")


@pytest.fixture(params=["decoder", "model"])
def model(checkpoint: Path, adapters: Path, request: pytest.FixtureRequest) -> Llama:
    """With a bank of both adapters; on either of the ways by which steps are computed."""
    model = load_model(checkpoint, torch.float32).eval()
    load_directory(model, adapters)
    if request.param == "decoder":
        prepare_to_generate(model)
        assert model.decoder is not None
    return model


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(checkpoint)


class Answer:
    """What the engine delivers."""

    def __init__(self) -> None:
        self.pieces: list[Piece | Exception] = []

    def __call__(self, piece: Piece | Exception) -> None:
        self.pieces.append(piece)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def ask(engine: Engine, requests: list[Request]) -> list[Answer]:
    answers = [Answer() for _ in requests]
    for request, answer in zip(requests, answers, strict=True):
        engine.submit(request, answer)
    while engine.step():
        pass
    assert engine.running == engine.waiting == 0
    return answers


def alone(model: Llama, tokenizer: Tokenizer, request: Request) -> str:
    """What `generation.py` says to a request."""
    with model.adapter_bank.using(request.adapter):
        pieces = stream_text(
            model, tokenizer, [list(request.prompt)], request.max_new_tokens, request.sampling, request.stop
        )
        return "".join(text for _, text in pieces)


def requests_of(tokenizer: Tokenizer, **changes: Any) -> list[Request]:
    """Prompts of different lengths with a common beginning, different adapters, and answers of different lengths."""
    return [
        Request(**dict(
            prompt=tokenizer.encode(f"{SYSTEM} {question}"),
            adapter=(None, "lakes", "rivers")[number % 3],
            max_new_tokens=5 + 7 * number,
        ) | changes)
        for number, question in enumerate(QUESTIONS)
    ]  # fmt: skip


def test_many_are_answered_as_each_is_alone(model: Llama, tokenizer: Tokenizer) -> None:
    requests = requests_of(tokenizer)
    expected = [alone(model, tokenizer, request) for request in requests]
    engine = Engine(model, tokenizer, slots=3)  # so that they wait, and take over each other's rows
    answers = ask(engine, requests)
    assert [answer.text for answer in answers] == expected
    assert len(set(expected)) == len(expected)
    for request, answer in zip(requests, answers, strict=True):
        *pieces, last = answer.pieces
        assert all(piece.finish_reason is None for piece in pieces) and last.finish_reason in ("stop", "length")
        count = sum(piece.new_tokens for piece in answer.pieces)
        assert count == request.max_new_tokens or last.finish_reason == "stop"


def test_those_who_come_later_change_nothing(model: Llama, tokenizer: Tokenizer) -> None:
    first, second = requests_of(tokenizer, max_new_tokens=20)[:2]
    engine, answers = Engine(model, tokenizer, slots=2), (Answer(), Answer())
    engine.submit(first, answers[0])
    for _ in range(6):
        engine.step()
    engine.submit(second, answers[1])
    while engine.step():
        pass
    assert [answer.text for answer in answers] == [alone(model, tokenizer, one) for one in (first, second)]


def test_a_common_beginning_is_read_once(model: Llama, tokenizer: Tokenizer) -> None:
    requests = requests_of(tokenizer, adapter="lakes", max_new_tokens=6)
    engine, answer = Engine(model, tokenizer, slots=4), Answer()
    common = len(tokenizer.encode(SYSTEM))
    tickets = [engine.submit(request, answer) for request in requests]
    while engine.step():
        pass
    assert tickets[0].cached_tokens == 0
    assert all(ticket.cached_tokens >= common for ticket in tickets[1:])
    assert engine.speed.prompt_tokens == sum(ticket.prompt_tokens - ticket.cached_tokens for ticket in tickets)
    # Another adapter computed other keys and values.
    assert engine.submit(requests_of(tokenizer, adapter="rivers")[0], answer) and engine.step()
    assert engine._slots[0].ticket.cached_tokens == 0
    # A conversation goes on in the slot where it was.
    engine = Engine(model, tokenizer, slots=2)
    (said,) = ask(engine, [requests[0]])
    longer = Request(
        prompt=[*requests[0].prompt, *tokenizer.encode(said.text)[:3], 5, 6], adapter="lakes", max_new_tokens=4
    )
    ticket = engine.submit(longer, answer := Answer())
    while engine.step():
        pass
    assert ticket.cached_tokens >= len(requests[0].prompt)
    assert answer.text == alone(model, tokenizer, longer)


def test_a_long_prompt_is_read_in_pieces_while_others_go_on(
    model: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_llama.batching.PROMPT_TOKENS", 40)
    short, long = (
        Request(prompt=tokenizer.encode(QUESTIONS[0]), max_new_tokens=30),
        Request(prompt=tokenizer.encode(" ".join(QUESTIONS * 2)), max_new_tokens=5, adapter="rivers"),
    )
    engine, answers = Engine(model, tokenizer, slots=2), (Answer(), Answer())
    engine.submit(short, answers[0])
    engine.step()
    engine.submit(long, answers[1])
    rounds = -(-len(long.prompt) // 40)
    for _ in range(rounds - 1):
        engine.step()
        assert not answers[1].pieces
    assert len(answers[0].pieces) >= rounds  # one for each round and the first
    while engine.step():
        pass
    assert [answer.text for answer in answers] == [alone(model, tokenizer, one) for one in (short, long)]


def test_a_seed_gives_the_same_sample_as_alone_and_beside_others(model: Llama, tokenizer: Tokenizer) -> None:
    requests = [
        request
        for seed in range(4)
        for request in requests_of(tokenizer, max_new_tokens=12, sampling=SamplingConfig(
            temperature=1.0, top_k=20, repetition_penalty=1.2, seed=seed
        ))[:2]
    ]  # fmt: skip
    together = [answer.text for answer in ask(Engine(model, tokenizer, slots=8), requests)]
    one_by_one = [ask(Engine(model, tokenizer, slots=1), [request])[0].text for request in requests]
    assert together == one_by_one
    assert len(set(together)) == len(together)
    if model.decoder is not None:
        assert together == [alone(model, tokenizer, request) for request in requests]


def test_stop_strings_end_an_answer_before_they_begin(model: Llama, tokenizer: Tokenizer) -> None:
    (request,) = requests_of(tokenizer, max_new_tokens=30)[:1]
    whole = alone(model, tokenizer, request)
    stop = whole[8:11]
    (answer,) = ask(Engine(model, tokenizer), [Request(prompt=request.prompt, max_new_tokens=30, stop=[stop])])
    assert answer.text == whole[: whole.index(stop)]
    assert answer.pieces[-1].finish_reason == "stop"


def test_logprobs_are_those_of_transformers(checkpoint: Path, model: Llama, tokenizer: Tokenizer) -> None:
    (request,) = requests_of(tokenizer, max_new_tokens=8, logprobs=3)[:1]
    (answer,) = ask(Engine(model, tokenizer), [request])
    found = [logprob for piece in answer.pieces for logprob in piece.logprobs]
    peer = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = [*request.prompt, *(one.token_id for one in found)]
    with torch.inference_mode():
        expected = peer(torch.tensor([ids])).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
    assert len(found) == 8
    for own, row in zip(found, expected, strict=True):
        assert own.logprob == pytest.approx(row[own.token_id].item(), abs=1e-4)
        assert [one.token_id for one in own.top] == row.topk(3).indices.tolist()
        assert own.top[0].token_id == own.token_id and own.top[0].logprob == own.logprob  # greedy
    assert b"".join(one.bytes for one in found).decode("utf-8", "replace") == answer.text


def test_choices_are_all_that_is_said(model: Llama, tokenizer: Tokenizer) -> None:
    choices = ["Oslo", "Os", "the Amazon", "é"]
    requests = requests_of(
        tokenizer,
        choices=ChoiceTree(tokenizer, choices),
        max_new_tokens=20,
        sampling=SamplingConfig(temperature=3.0, seed=1),
    )
    answers = ask(Engine(model, tokenizer, slots=3), requests)
    assert {answer.text for answer in answers} <= set(choices)
    assert len({answer.text for answer in answers}) > 1
    assert all(answer.pieces[-1].finish_reason == "stop" for answer in answers)
    # A temperature so small that the quotient by it would be infinite.
    coldest = replace(requests[0], sampling=SamplingConfig(temperature=1e-44))
    greedy = replace(requests[0], sampling=SamplingConfig(temperature=0.0))
    assert len({answer.text for answer in ask(Engine(model, tokenizer), [coldest, greedy])}) == 1


def test_choices_are_taken_as_often_as_their_tokens_are_likely(model: Llama, tokenizer: Tokenizer) -> None:
    prompt, choices = tokenizer.encode(QUESTIONS[0]), ["a", "b", "c"]
    ids = [tokenizer.encode(choice)[0] for choice in choices]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]))[0, -1, ids].double().softmax(-1) * 300
    sampling = [SamplingConfig(temperature=1.0, seed=seed) for seed in range(300)]
    tree = ChoiceTree(tokenizer, choices)
    requests = [Request(prompt=prompt, max_new_tokens=2, choices=tree, sampling=config) for config in sampling]
    counts = Counter(answer.text for answer in ask(Engine(model, tokenizer, max_waiting=None), requests))
    assert chisquare([counts[choice] for choice in choices], expected.tolist()).pvalue > 1e-3


def drafters(checkpoint: Path) -> dict[str, Callable]:
    def wrong(tokens: list[int], count: int) -> list[int]:
        return [7] * count

    draft = load_model(checkpoint, torch.float32).eval()
    return {"look up": lambda: look_up, "wrong": lambda: wrong, "model": lambda: DraftModel(draft)}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["look up", "wrong", "model"])
def test_guesses_change_nothing_that_is_said(
    checkpoint: Path, model: Llama, tokenizer: Tokenizer, kind: str, temperature: float
) -> None:
    requests = requests_of(tokenizer, sampling=SamplingConfig(temperature=temperature, repetition_penalty=1.05))[:6]
    expected = [answer.text for answer in ask(Engine(model, tokenizer, slots=3), requests)]
    engine = Engine(model, tokenizer, slots=3, make_drafter=drafters(checkpoint)[kind])
    assert [answer.text for answer in ask(engine, requests)] == expected
    assert engine.guessed > 0 or (kind, temperature) == ("look up", 0.7)  # samples of this model repeat nothing
    if kind == "model":  # the base, of which the adapters' answers keep little
        assert engine.guessed_right > 0


def test_guesses_of_the_model_itself_are_right(checkpoint: Path, model: Llama, tokenizer: Tokenizer) -> None:
    (request,) = requests_of(tokenizer, max_new_tokens=41, adapter=None)[:1]
    engine = Engine(model, tokenizer, slots=1, make_drafter=drafters(checkpoint)["model"])
    (answer,) = ask(engine, [request])
    assert answer.text == alone(model, tokenizer, request)
    if answer.pieces[-1].finish_reason == "length":
        assert engine.guessed_right == engine.guessed and engine.speed.steps == 8  # 40 tokens, five a step


def test_sampling_with_guesses_follows_the_models_probabilities(
    checkpoint: Path, model: Llama, tokenizer: Tokenizer
) -> None:
    """The second token of many samples, which a guess precedes, against the product of the model's probabilities."""
    prompt = tokenizer.encode(QUESTIONS[0])
    sampling = [SamplingConfig(temperature=1.0, top_k=2, seed=seed) for seed in range(400)]
    requests = [Request(prompt=prompt, max_new_tokens=3, logprobs=0, sampling=config) for config in sampling]
    engine = Engine(model, tokenizer, slots=4, max_waiting=None, make_drafter=drafters(checkpoint)["model"])
    counts: Counter = Counter()
    for answer in ask(engine, requests):
        counts[tuple(one.token_id for piece in answer.pieces for one in piece.logprobs)[:2]] += 1
    expected = {}
    with torch.inference_mode():
        first = model(torch.tensor([prompt]))[0, -1].double().topk(2)
        for token, share in zip(first.indices.tolist(), first.values.softmax(-1).tolist(), strict=True):
            second = model(torch.tensor([[*prompt, token]]))[0, -1].double().topk(2)
            for other, part in zip(second.indices.tolist(), second.values.softmax(-1).tolist(), strict=True):
                expected[token, other] = share * part * sum(counts.values())
    assert counts.keys() <= expected.keys() and not tokenizer.stop_ids & {one for pair in expected for one in pair}
    assert chisquare([counts[pair] for pair in expected], list(expected.values())).pvalue > 1e-3


def test_look_up_finds_what_followed_the_last_tokens() -> None:
    assert look_up([1, 2, 3, 4, 9, 2, 3, 4], 2) == [9, 2]
    assert look_up([3, 4, 5, 1, 2, 3, 4, 6, 0, 3, 4], 3) == [6, 0, 3]  # of two the latest
    assert look_up([8, 2, 3, 4, 7, 3, 4, 6, 2, 3, 4], 1) == [7]  # of lengths the longest
    assert look_up([1, 2, 3], 2) == look_up([4], 2) == look_up([5, 1, 5], 2) == []  # one alone is no occurrence
    assert look_up([6, 6, 6], 4) == [6]


def test_cancelling_frees_the_slot_and_delivers_no_more(model: Llama, tokenizer: Tokenizer) -> None:
    requests = requests_of(tokenizer, max_new_tokens=40)
    engine, answers = Engine(model, tokenizer, slots=1), [Answer() for _ in range(3)]
    tickets = [engine.submit(request, answer) for request, answer in zip(requests, answers, strict=False)]
    engine.step()
    assert (engine.running, engine.waiting) == (1, 2)
    engine.cancel(tickets[0]), engine.cancel(tickets[1])
    assert engine.waiting == 1
    count = len(answers[0].pieces)
    while engine.step():
        pass
    assert len(answers[0].pieces) == count and not answers[1].pieces
    assert answers[2].text == alone(model, tokenizer, requests[2])

    def gone(piece: Piece | Exception) -> None:
        raise ConnectionError

    engine.submit(requests[0], gone)
    engine.step(), engine.step()
    assert engine.running == 0


def test_an_error_of_one_request_is_told_to_it_and_others_go_on(
    model: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = requests_of(tokenizer, max_new_tokens=10, adapter=None)[:2]
    engine, answers = Engine(model, tokenizer, slots=2), [Answer(), Answer()]
    using = model.adapter_bank.using

    def failing(adapter: str | None) -> Any:
        if adapter == "lakes":
            raise RuntimeError("out of memory")
        return using(adapter)

    with monkeypatch.context() as patch:
        patch.setattr(model.adapter_bank, "using", failing)
        engine.submit(Request(prompt=first.prompt, adapter="lakes"), answers[0])
        engine.submit(second, answers[1])
        while engine.step():
            pass
    assert [str(piece) for piece in answers[0].pieces] == ["out of memory"]
    assert answers[1].text == alone(model, tokenizer, second)


def test_an_error_of_a_later_token_is_told_to_its_request_too(
    model: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = requests_of(tokenizer, max_new_tokens=10)[:2]
    expected, calls = alone(model, tokenizer, second), []

    def failing(self: Engine, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    def no_guess(tokens: list[int], count: int) -> list[int]:
        raise RuntimeError("no memory to guess")

    monkeypatch.setattr(Engine, "_logprob", failing)
    engine = Engine(model, tokenizer, slots=2, make_drafter=lambda: no_guess)
    answers = ask(engine, [replace(first, logprobs=1), second])
    assert len(answers[0].pieces) == 4 and str(answers[0].pieces[-1]) == "out of memory"
    assert answers[1].text == expected
    said = capfd.readouterr().err
    assert said.count("no more guesses of an answer: no memory to guess") == 2  # once an answer


def test_rows_of_the_head_that_are_no_token_are_never_said(checkpoint: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = Llama(replace(LlamaConfig.from_json(checkpoint), vocab_size=tokenizer.vocab_size + 32)).eval()
    model.initialize_(std=0.15)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.vocab_size :] *= 5  # likely
    prompt = tokenizer.encode(QUESTIONS[0])
    with torch.inference_mode():
        assert model(torch.tensor([prompt]))[0, -1].argmax() >= tokenizer.vocab_size
    sampling = SamplingConfig(temperature=2.0, seed=3)
    requests = [Request(prompt=prompt, max_new_tokens=20, logprobs=10**6, sampling=s) for s in (sampling, GREEDY)]
    engine = Engine(model, tokenizer, make_drafter=lambda: lambda tokens, count: [5, tokenizer.vocab_size + 1])
    for answer in ask(engine, requests):
        logprobs = [one for piece in answer.pieces for one in piece.logprobs]
        assert logprobs and all(len(one.top) == tokenizer.vocab_size for one in logprobs)
        assert sum(math.exp(one.logprob) for one in logprobs[0].top) == pytest.approx(1, abs=1e-4)


def test_a_draft_model_reads_a_long_prompt_piece_by_piece(
    checkpoint: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(checkpoint, torch.float32).eval()
    prepare_to_generate(model)
    prompt = [5 + number % 300 for number in range(70)]
    (said,) = generate(model, prompt, 8)
    monkeypatch.setattr("lit_llama.drafting.READ_TOKENS", 20)
    draft = DraftModel(model)
    assert [draft(prompt, 4) for _ in range(4)] == [[], [], [], said[:4]]
    assert draft(prompt + said[:4], 4) == said[4:]


def test_what_cannot_be_asked_is_refused(model: Llama, tokenizer: Tokenizer, checkpoint: Path) -> None:
    engine = Engine(model, tokenizer, slots=1, max_length=64, max_waiting=1)
    ids = tokenizer.encode("Capital?")
    for request, said in [
        (Request(prompt=[]), "empty"),
        (Request(prompt=[5] * 64), "64"),
        (Request(prompt=ids, max_new_tokens=63), "context of 64"),
        (Request(prompt=ids, max_new_tokens=0), "at least 1"),
        (Request(prompt=[99999]), "vocabulary"),
        (Request(prompt=ids, adapter="seas"), "lakes, rivers"),
        (Request(prompt=ids, stop=[""]), "stop"),
        (Request(prompt=ids, sampling=SamplingConfig(num_samples=2, temperature=1)), "one answer"),
    ]:
        with pytest.raises(InputError, match=said):
            engine.submit(request, print)
    for choices in ([], ["a", "a"], ["a", ""]):
        with pytest.raises(InputError, match="choices"):
            ChoiceTree(tokenizer, choices)
    engine.submit(Request(prompt=ids), print)
    with pytest.raises(Full, match="1 requests wait"):
        engine.submit(Request(prompt=ids), print)
    with pytest.raises(InputError, match="slots"):
        Engine(model, tokenizer, slots=0)
    tree = load_model(checkpoint, torch.float32)
    inject_lora_tree(tree, LoRATreeConfig(depth=1, r=2))
    with pytest.raises(InputError, match="tree"):
        Engine(tree, tokenizer, make_drafter=lambda: look_up)


def test_a_draft_model_of_another_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    check_vocabulary(tokenizer, tokenizer)

    class Other:
        path, vocab_size = Path("other"), tokenizer.vocab_size

        def bytes_of(self, token_id: int) -> bytes:
            return b"?" if token_id == 300 else tokenizer.bytes_of(token_id)

    with pytest.raises(InputError, match="vocabulary"):
        check_vocabulary(tokenizer, Other())


@pytest.fixture
def running(model: Llama, tokenizer: Tokenizer) -> Iterator[Engine]:
    engine = Engine(model, tokenizer, slots=2)
    thread = threading.Thread(target=engine.run)
    thread.start()
    yield engine
    engine.close()
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_a_thread_answers_what_others_ask(running: Engine, model: Llama, tokenizer: Tokenizer) -> None:
    requests = requests_of(tokenizer, max_new_tokens=8)
    done, texts = threading.Semaphore(0), [""] * len(requests)

    def deliver(number: int, piece: Piece | Exception) -> None:
        texts[number] += piece.text
        if piece.finish_reason:
            done.release()

    for number, request in enumerate(requests):
        running.submit(request, lambda piece, number=number: deliver(number, piece))
    assert all(done.acquire(timeout=20) for _ in requests)
    running.close()
    with pytest.raises(RunError, match="closed"):
        running.submit(requests[0], print)
    assert texts == [alone(model, tokenizer, request) for request in requests]


def test_closing_tells_those_without_a_whole_answer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    model = load_model(checkpoint, torch.float32).eval()
    engine, answer, begun = Engine(model, tokenizer, slots=1), Answer(), threading.Event()
    thread = threading.Thread(target=engine.run)
    thread.start()

    def deliver(piece: Piece | Exception) -> None:
        answer(piece)
        begun.set()
        if len(answer.pieces) == 2:
            engine.close()

    engine.submit(Request(prompt=tokenizer.encode(QUESTIONS[0])), deliver)
    assert begun.wait(20)
    thread.join(timeout=20)
    assert not thread.is_alive() and isinstance(answer.pieces[-1], RunError)
    assert math.isfinite(engine.speed.decode_rate)


def test_a_prompt_fills_the_context_to_its_last_token(checkpoint: Path, tokenizer: Tokenizer) -> None:
    model = load_model(checkpoint, torch.float32).eval()
    prompt = [5 + number % 300 for number in range(40)]
    (expected,) = generate(model, prompt, 24, stop_ids=tokenizer.stop_ids)
    for drafter in (None, lambda: look_up):
        engine = Engine(model, tokenizer, slots=2, max_length=64, make_drafter=drafter)
        (answer,) = ask(engine, [Request(prompt=prompt)])
        assert answer.text == tokenizer.decode(expected)
