"""Generation against transformers: its logits processors, its greedy text; and against itself, one prompt at a time."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from lit_llama import generation
from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.generation import (
    Sampler,
    SamplingConfig,
    Speed,
    TextStream,
    answer_questions,
    filter_logits,
    generate,
    generate_stream,
    penalize_repetition,
    stream_text,
)
from lit_llama.kv_cache import KVCache
from lit_llama.lora import LoRAConfig, inject_lora
from lit_llama.model import Llama
from lit_llama.packed_linear import PackedLinear, pack_linear_layers
from lit_llama.prompts import encode_prompt
from lit_llama.tokenizer import Tokenizer

needs_bf16_instructions = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bf16 on this CPU",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For these tiny models a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(dtype: torch.dtype = torch.float32, **changes: object) -> Llama:
    """A random model whose greedy text wanders: its next tokens are nearly equally likely."""
    shape = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    config = LlamaConfig(**shape | dict(intermediate_size=160, vocab_size=320, max_position_embeddings=512) | changes)
    torch.manual_seed(0)
    model = Llama(config)
    model.initialize_(std=0.15)
    return model.to(dtype).eval().requires_grad_(False)


def random_prompts(lengths: list[int], vocab_size: int = 320) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "lively"
    save_checkpoint(random_model(num_attention_heads=4), directory, tokenizer_from=tiny_checkpoint)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Llama:
    return load_model(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(tiny_checkpoint)


# --- choosing a token -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "warper"),
    [
        ({"top_k": 1}, transformers.TopKLogitsWarper(1)),
        ({"top_k": 40}, transformers.TopKLogitsWarper(40)),
        ({"top_k": 5000}, transformers.TopKLogitsWarper(5000)),
        ({"top_p": 0.05}, transformers.TopPLogitsWarper(0.05)),
        ({"top_p": 0.9}, transformers.TopPLogitsWarper(0.9)),
        ({"top_p": 1.0}, transformers.TopPLogitsWarper(1.0)),
        ({"min_p": 0.02}, transformers.MinPLogitsWarper(0.02)),
        ({"min_p": 1.0}, transformers.MinPLogitsWarper(1.0)),
        (
            {"top_k": 40, "top_p": 0.8, "min_p": 0.05},
            lambda ids, logits: transformers.MinPLogitsWarper(0.05)(
                ids, transformers.TopPLogitsWarper(0.8)(ids, transformers.TopKLogitsWarper(40)(ids, logits))
            ),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "transformers",
)
def test_filters_are_those_of_transformers(own: dict, warper: object) -> None:
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 3
    ours = filter_logits(logits, own.get("top_k"), own.get("top_p"), own.get("min_p"))
    assert torch.equal(ours, warper(None, logits.clone()))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 100, generator=generator) * 3
    ids = torch.randint(100, (8, 30), generator=generator)  # with repeats: the penalty counts once
    seen = torch.zeros(8, 100, dtype=torch.bool).scatter_(1, ids, True)
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    sampler = Sampler(SamplingConfig(temperature=0.7), [[0]], 5, torch.device("cpu"))
    draws = sampler.draw(logits.expand(200_000, 5))
    expected = torch.softmax(logits.double() / 0.7, dim=-1) * len(draws)
    chi_square = ((torch.bincount(draws, minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 0.999 quantile with 4 degrees of freedom


def test_seed_decides_and_the_callers_random_state_is_left_alone(model: Llama) -> None:
    state = torch.get_rng_state()
    sampling = SamplingConfig(temperature=1.0, seed=7)
    texts = [generate(model, [5, 6, 7], 20, replace(sampling, seed=seed)) for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"repetition_penalty": 0},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"num_samples": 0},
        {"num_samples": 2},
    ],
    ids=str,
)
def test_impossible_sampling_is_refused_by_name(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        SamplingConfig(**options)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_text_is_that_of_transformers(model: Llama, peer: transformers.PreTrainedModel, penalty: float) -> None:
    for prompt in random_prompts([1, 9, 40]):
        ids = torch.tensor([prompt])
        config = transformers.GenerationConfig(
            max_new_tokens=40, do_sample=False, repetition_penalty=penalty, eos_token_id=2, pad_token_id=2
        )
        expected = peer.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected = expected[0, len(prompt) :].tolist()
        ours = generate(model, ids, 40, SamplingConfig(repetition_penalty=penalty), stop_ids={2})
        assert ours == [expected[: expected.index(2)] if 2 in expected else expected]


SHAPES = {
    "grouped heads": {},
    "sliding window": {"model_type": "mistral", "sliding_window": 20},
    "SmolLM2's products, of one row in another kernel": dict(
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=1536,
    ),
    "one key head of an odd size": {"num_key_value_heads": 1, "head_dim": 10, "num_attention_heads": 5},
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16_instructions)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefill_tokens", [2048, 60])
def test_batch_gives_the_text_of_single_prompts(
    shape: str, dtype: torch.dtype, prefill_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(dtype, **SHAPES[shape])
    prompts = random_prompts([37, 1, 5, 120, 64, 37, 2])
    alone = [generate(model, prompt, 48)[0] for prompt in prompts]
    monkeypatch.setattr(generation, "PREFILL_TOKENS", prefill_tokens)
    together = generate(model, prompts, 48)
    for prompt, one, other in zip(prompts, together, alone, strict=True):
        if one != other:  # some processors multiply more rows in another order, which only a tie in bf16 may show
            assert dtype == torch.bfloat16
            at = next(at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + one[:at]]))[0, -1].float()
            assert {one[at], other[at]} == set(logits.topk(2).indices.tolist())
            assert abs(logits[one[at]] - logits[other[at]]) < 0.05 * logits.abs().max()
    if together != alone:
        return
    # Rows that end early leave the batch; the others must not notice.
    stop_ids = {row[at] for row, at in zip(alone, (3, 40, 9, 25, 47, 1, 30), strict=True)}
    stopped = [row[: next((i for i, token in enumerate(row) if token in stop_ids), 48)] for row in alone]
    assert generate(model, prompts, 48, stop_ids=stop_ids) == stopped


def test_forms_of_prompts(model: Llama) -> None:
    ids = random_prompts([12, 12])
    both = generate(model, ids, 5)
    assert generate(model, torch.tensor(ids), 5) == both
    assert generate(model, torch.tensor(ids[0]), 5) == generate(model, ids[0], 5) == both[:1]
    assert generate(model, [torch.tensor(row) for row in ids], 5) == both


def test_samples_share_one_prefill(model: Llama) -> None:
    passes = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: passes.append(args[0].shape))
    rows = generate(model, random_prompts([20, 11]), 6, SamplingConfig(temperature=2.0, num_samples=3))
    handle.remove()
    assert passes == [(2, 20)] + [(6, 1)] * 5
    assert len({tuple(row) for row in rows}) == 6
    # All but certain draws are greedy: then the samples of a prompt are its greedy text.
    sure = SamplingConfig(temperature=1e-4, num_samples=3)
    greedy = generate(model, random_prompts([20, 11]), 6)
    assert generate(model, random_prompts([20, 11]), 6, sure) == [greedy[0]] * 3 + [greedy[1]] * 3


def test_stream_yields_what_generate_returns_and_ends_rows_when_told() -> None:
    model = random_model()
    prompts = random_prompts([7, 3, 9])
    whole = generate(model, prompts, 20)
    rows: list[list[int]] = [[], [], []]
    limits = [20, 4, 11]
    speed = Speed()
    for row, token_id in generate_stream(
        model, prompts, 20, ended=lambda row: len(rows[row]) == limits[row], speed=speed
    ):
        rows[row].append(token_id)
    assert rows == [text[:limit] for text, limit in zip(whole, limits, strict=True)]
    assert (speed.prompt_tokens, speed.steps, speed.new_tokens) == (19, 19, 19 + 3 + 10)
    assert speed.prefill_seconds > 0 and speed.decode_seconds > 0


def test_without_a_limit_the_context_is_filled() -> None:
    model = random_model(max_position_embeddings=50)
    assert [len(row) for row in generate(model, random_prompts([20, 31]))] == [19, 19]
    assert [len(row) for row in generate(model, random_prompts([20]))] == [30]


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 5, "no prompt"),
        ([[1], []], 5, "prompt 2 is empty"),
        ([[1, 320]], 5, "vocabulary of 320"),
        ([[-1]], 5, "vocabulary of 320"),
        ([[1] * 512], None, "the prompt has 512 tokens .* context of 512"),
        ([[1], [1] * 600], 5, "prompt 2 has 600 tokens .* context of 512"),
        ([[1] * 500], 13, "the prompt has 500 tokens; with max_new_tokens 13 .* context of 512"),
        ([[1]], 0, "max_new_tokens 0"),
    ],
)
def test_wrong_prompts_are_refused(prompts: list, max_new_tokens: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(random_model(), prompts, max_new_tokens)


def test_a_prompt_may_fill_the_context_to_the_last_token() -> None:
    assert len(generate(random_model(), random_prompts([500]), 12)[0]) == 12


# --- stop strings -----------------------------------------------------------------------------------------------------


def test_stop_strings_cut_wherever_token_boundaries_lie(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choices("abAB é\n🙂", k=40))
        stop = ["".join(generator.choices("abAB é\n", k=generator.randint(1, 4))) for _ in range(2)]
        # One token a byte now and then, so that boundaries fall inside of words, stops and characters.
        ids = [i for part in text.split("a") for i in tokenizer.encode(part) + tokenizer.encode("a")]
        text = tokenizer.decode(ids)
        found = [text.find(string) for string in stop if string in text]
        stream = TextStream(tokenizer, stop)
        printed = ""
        for token_id in ids:
            piece = stream.push(token_id)
            printed += piece
            assert text.startswith(printed)
            assert not (stream.finished and piece == "" and printed != text[: min(found)])
        assert stream.finished == bool(found)
        assert printed + stream.flush() == (text[: min(found)] if found else text)


def test_text_is_held_back_no_longer_than_needed(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["END", "DONE"])
    pieces = [stream.push(token_id) for character in "xENDx"[:3] + "yDO" for token_id in tokenizer.encode(character)]
    assert pieces == ["x", "", "", "ENy", "", ""]
    assert stream.flush() == "DO"


def test_a_stop_string_ends_its_row_only(model: Llama, tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode("Norway"), tokenizer.encode("The highest point")]
    free = ["", ""]
    for row, text in stream_text(model, tokenizer, prompts, 40):
        free[row] += text
    stop = free[0][5:8]
    cut = ["", ""]
    for row, text in stream_text(model, tokenizer, prompts, 40, stop=[stop]):
        cut[row] += text
    assert cut == [text.split(stop)[0] for text in free]


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="empty stop string"):
        TextStream(tokenizer, [""])


# --- questions --------------------------------------------------------------------------------------------------------

QUESTIONS = [
    "What is the highest point of Norway?",
    "Capital?",
    "Which river carries more water than any other river of the world, and through which countries does it flow?",
    "What is the internet country code of Norway?",
    "How many countries border Brazil?",
]


def test_questions_are_answered_in_order_whatever_the_batch(model: Llama, tokenizer: Tokenizer) -> None:
    alone = []
    for question in QUESTIONS:
        ids = generate(model, encode_prompt(tokenizer, "chatml", question), 24, stop_ids=tokenizer.stop_ids)[0]
        alone.append(tokenizer.decode(ids).strip())
    for batch_size in (1, 2, 16):
        assert answer_questions(model, tokenizer, QUESTIONS, "chatml", 24, batch_size) == alone
    assert answer_questions(model, tokenizer, [], "chatml") == []


def test_answering_leaves_no_trace_on_the_model(checkpoint: Path, tokenizer: Tokenizer) -> None:
    model = load_model(checkpoint, dtype=torch.float32)
    inject_lora(model, LoRAConfig(r=4, dropout=0.5))
    model.train()
    model.model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    parameters = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    first = answer_questions(model, tokenizer, QUESTIONS, "chatml", 8)
    assert answer_questions(model, tokenizer, QUESTIONS, "chatml", 8) == first  # no dropout
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == parameters[name][0] and torch.equal(parameter, parameters[name][1])
    model(torch.tensor([[1, 2, 3]])).sum().backward()  # and training goes on


# --- packed linear layers ---------------------------------------------------------------------------------------------


@needs_bf16_instructions
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("r", [None, 8])
def test_packed_linear_computes_the_same(rows: int, r: int | None) -> None:
    model = random_model(torch.bfloat16)
    if r:
        inject_lora(model, LoRAConfig(r=r))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    layer = model.model.layers[1].mlp.down_proj
    x = torch.randn(1, rows, 160, dtype=torch.bfloat16)
    expected = layer(x)
    pack_linear_layers(model)
    packed = model.model.layers[1].mlp.down_proj
    assert isinstance(packed, PackedLinear) and isinstance(model.lm_head, PackedLinear)
    assert packed(x).shape == expected.shape
    torch.testing.assert_close(packed(x), expected, rtol=2**-7, atol=2**-7)


@needs_bf16_instructions
def test_packing_keeps_the_text_and_leaves_other_models_alone() -> None:
    prompts = random_prompts([30, 4, 17])
    model = random_model(torch.bfloat16, tie_word_embeddings=True)
    expected = generate(model, prompts, 30)
    pack_linear_layers(model)
    assert generate(model, prompts, 30) == expected
    model = random_model()
    pack_linear_layers(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


# --- the cache --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_selected_rows_go_on_as_they_would_have() -> None:
    model = random_model()
    prompts = torch.tensor(random_prompts([300, 300]))
    caches = [KVCache(model.config, 2, 512, torch.float32, padding=torch.tensor([0, 290])) for _ in range(2)]
    for cache in caches:
        model(prompts, cache=cache)
    caches[1].select(torch.tensor([1, 0, 1]))
    new = torch.tensor([[3], [4]])
    expected = model(new, cache=caches[0])
    got = model(new[[1, 0, 1]], cache=caches[1])
    torch.testing.assert_close(got, expected[[1, 0, 1]], rtol=1e-5, atol=1e-5)
    alone = model(F.pad(prompts[1:, 290:], (0, 1), value=4))
    torch.testing.assert_close(got[0, -1], alone[0, -1], rtol=1e-5, atol=1e-5)
