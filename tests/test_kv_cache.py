"""The cache in 8 bits and behind a sliding window, against the whole sequence without a cache, and what it holds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_cpu_decode import random_model, token_ids
from torch import Tensor

from lit_llama import kv_cache
from lit_llama.batching import Engine, Request
from lit_llama.cpu_decode import cpu_decoder
from lit_llama.errors import InputError
from lit_llama.generation import generate, prepare_to_generate
from lit_llama.kv_cache import KVCache
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer

WINDOW, CAPACITY = 24, 48


@pytest.fixture(autouse=True)
def short_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A window that rolls within the tests' sequences, and one thread."""
    monkeypatch.setattr(kv_cache, "PASS_TOKENS", CAPACITY - WINDOW)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(tiny_checkpoint)


def rolling_model() -> Llama:
    return random_model(sliding_window=WINDOW, model_type="mistral", max_position_embeddings=1024)


@torch.inference_mode()
def piecewise(model: Llama, ids: Tensor, pieces: list[int], cache: KVCache, decoder: bool) -> Tensor:
    """Logits (rows, pieces, vocab) after each of the pieces in which a sequence is read."""
    model.decoder = cpu_decoder(model) if decoder else None
    logits = []
    for piece in ids.split(pieces, dim=1):
        if not decoder:
            logits.append(model(piece, cache=cache)[:, -1])
        elif piece.shape[1] <= 4:
            logits.append(model.decoder(piece.contiguous(), cache)[:, -1])
        else:
            logits.append(model.lm_head(model.decoder.read(piece, cache)))
    return torch.stack(logits, dim=1)


PIECES = {"one by one": [1] * 200, "mixed": [20, 1, 1, 17, 24, 3, 1, 24, 4, 24, 24, 1, 24, 4, 24, 2, 2]}


@pytest.mark.parametrize("decoder", [False, True], ids=["model", "decoder"])
@pytest.mark.parametrize("pieces", PIECES)
def test_a_window_rolls_through_a_fixed_memory(pieces: str, decoder: bool) -> None:
    model, ids, lengths = rolling_model(), token_ids(3, 200), PIECES[pieces]
    cache = KVCache(model.config, 3, 200, torch.float32)
    found = piecewise(model, ids, lengths, cache, decoder)
    assert {tensor.shape for tensor in cache.tensors()} == {(3, 2, CAPACITY, 12)}
    ends = torch.tensor(lengths).cumsum(0) - 1
    with torch.inference_mode():
        expected = model(ids)[:, ends]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", [False, True], ids=["model", "decoder"])
def test_rows_of_other_lengths_roll_each_at_its_own_place(decoder: bool) -> None:
    model, ids, padding = rolling_model(), token_ids(4, 200), torch.tensor([0, 21, 3, 70])
    lengths = [24, 24, 24, 1, 3, 24, 1, 1, 24, 24, 4, 24, 20, 2]
    cache = KVCache(model.config, 4, 200, torch.float32, padding=padding)
    found = piecewise(model, ids, lengths, cache, decoder)
    ends = torch.tensor(lengths).cumsum(0) - 1
    for row, nothing in enumerate(padding.tolist()):
        own = ends >= nothing
        with torch.inference_mode():
            expected = model(ids[row : row + 1, nothing:])[0, ends[own] - nothing]
        torch.testing.assert_close(found[row, own], expected, rtol=1e-4, atol=1e-4)


def test_the_decoder_takes_several_tokens_a_step_as_one_by_one() -> None:
    model, ids = rolling_model(), token_ids(2, 160)
    caches = [KVCache(model.config, 2, 160, torch.float32, quantize=quantize) for quantize in (None, "int8") * 2]
    for first, second in zip(caches[:2], caches[2:], strict=True):
        one_by_one = piecewise(model, ids, [1] * 160, first, True)
        assert torch.equal(piecewise(model, ids, [4] * 40, second, True), one_by_one[:, 3::4])


def test_a_full_window_takes_no_longer_pass_than_its_memory_allows() -> None:
    model, cache = rolling_model(), KVCache(rolling_model().config, 1, 500, torch.float32)
    with torch.inference_mode():
        first = model(token_ids(1, 150), cache=cache)  # as long as nothing rolled, memory is set aside for it
        torch.testing.assert_close(first, model(token_ids(1, 150)), rtol=1e-4, atol=1e-4)
        model(token_ids(1, 100), cache=cache)
        assert cache.capacity == 176
        with pytest.raises(InputError, match="160 tokens at once behind a sliding window; at most 152 can be read"):
            model(token_ids(1, 160), cache=cache)
    with pytest.raises(InputError, match="rolled on from token 90 to 250"):
        cache.wind_back(90)
    cache.wind_back(240)
    assert cache.length == 240
    with pytest.raises(InputError, match="rolled on from token 100 to 250"):
        cache.wind_back(100)  # going back before gave nothing back
    cache.wind_back(0)
    assert cache.reached == 0


def test_memory_that_cannot_be_had_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(rolling_model().config, 1, 500, torch.float32, quantize="int8")
    cache.reserve(10)
    shapes, calls, whole = [tensor.shape for tensor in cache.tensors()], [], kv_cache.F.pad

    def pad(tensor: Tensor, *rest: object) -> Tensor:
        calls.append(tensor)
        if len(calls) == 4:  # values are the second of four
            raise MemoryError
        return whole(tensor, *rest)

    with monkeypatch.context() as context, pytest.raises(MemoryError):
        context.setattr(kv_cache.F, "pad", pad)
        cache.reserve(40)
    assert [tensor.shape for tensor in cache.tensors()] == shapes


@pytest.mark.parametrize("decoder", [False, True], ids=["model", "decoder"])
def test_int8_holds_every_head_to_half_a_step_of_its_scale(decoder: bool) -> None:
    model, ids = random_model(), token_ids(2, 60)
    exact, held = (KVCache(model.config, 2, 60, torch.float32, quantize=quantize) for quantize in (None, "int8"))
    expected = piecewise(model, ids, [30, 1, 2, 20, 7], exact, False)
    found = piecewise(model, ids, [30, 1, 2, 20, 7], held, decoder)
    for name in ("keys", "values"):
        codes, scales = (torch.stack(getattr(held, part)).double() for part in (name, f"{name[:-1]}_scales"))
        truth = torch.stack(getattr(exact, name)).double()
        # Of the first layer; the second's input is changed by what the first one lost.
        largest = truth[0, :, :, :60].abs().amax(dim=-1, keepdim=True)
        torch.testing.assert_close(scales[0, :, :, :60], largest / 127, rtol=1e-4, atol=0)
        error = (codes * scales - truth)[0, :, :, :60].abs() / largest
        assert 0.3 / 127 < error.max() <= 0.501 / 127
        assert codes.abs().max() == 127
    assert 0 < (found - expected).norm() / expected.norm() < 0.02
    taken = [sum(tensor.numel() * tensor.itemsize for tensor in cache.tensors()) for cache in (exact, held)]
    assert taken[1] / taken[0] == (12 + 4) / (4 * 12)


@pytest.mark.parametrize("decoder", [False, True], ids=["model", "decoder"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_text_goes_on_as_without_a_rolling_window(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, decoder: bool, quantize: str | None
) -> None:
    model, prompts = rolling_model(), [token_ids(1, length)[0].tolist() for length in (5, 90, 23, 130)]
    if decoder:
        prepare_to_generate(model)
    with monkeypatch.context() as context:
        context.setattr(kv_cache, "PASS_TOKENS", 1000)
        options = dict(stop_ids=tokenizer.stop_ids, quantize_cache=quantize)
        expected = [generate(model, [prompt], 70, **options)[0] for prompt in prompts]
    assert generate(model, prompts, 70, **options) == expected
    engine = Engine(model, tokenizer, slots=2, quantize_cache=quantize)
    # Asked again, a prompt goes on from what a slot still holds of it, or from nothing.
    for number in (0, 1, 2, 3, 1, 3, 3, 0):
        request = Request(prompt=prompts[number], max_new_tokens=70, logprobs=0)
        pieces = [piece for _, piece in engine.answer([request])]
        assert [one.token_id for piece in pieces for one in piece.logprobs] == expected[number]


def test_a_prompt_that_a_slot_has_rolled_past_is_read_again(tokenizer: Tokenizer) -> None:
    model = rolling_model()
    prepare_to_generate(model)
    prompt = token_ids(1, 30)[0].tolist()
    engine = Engine(model, tokenizer, slots=1)

    def cached(prompt: list[int], new: int) -> int:
        ticket = engine.submit(Request(prompt=prompt, max_new_tokens=new), lambda piece: None)
        while engine.step():
            pass
        return ticket.cached_tokens

    assert cached(prompt, 5) == 0
    assert cached(prompt, 80) == 29
    assert cached(prompt, 5) == 0


@pytest.mark.parametrize("slots", [1, 2])
def test_what_a_slot_has_rolled_past_stays_lost_when_it_goes_back(tokenizer: Tokenizer, slots: int) -> None:
    model = rolling_model()
    prepare_to_generate(model)
    first = token_ids(1, 46)[0].tolist()
    prompts = [first, [*first[:44], 7], [*first[:20], 9]]  # the second goes back a little, the third far
    engine, cached = Engine(model, tokenizer, slots=slots), []
    for prompt, new in zip(prompts, (5, 1, 5), strict=True):
        ticket = engine.submit(Request(prompt=prompt, max_new_tokens=new, logprobs=0), (pieces := []).append)
        while engine.step():
            pass
        cached.append(ticket.cached_tokens)
        said = [one.token_id for piece in pieces for one in piece.logprobs]
        assert said == generate(model, [prompt], new, stop_ids=tokenizer.stop_ids)[0]
    assert cached == [0, 44, 0]
