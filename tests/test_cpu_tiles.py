"""Prompts by the tiles of processors that have them, against float64: products, attention, whole models."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_llama import cpu_decode
from lit_llama.adapters import load_directory
from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.config import LlamaConfig
from lit_llama.cpu_decode import CPUDecoder, cpu_decoder
from lit_llama.generation import generate, prepare_to_generate
from lit_llama.kv_cache import KVCache
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter
from lit_llama.model import Llama
from lit_llama.quantization import QuantizedLinear

library = cpu_decode._library()
pytestmark = pytest.mark.skipif(library is None or not library.decoder_tiles(), reason="no tiles here")

SHAPE = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64)


@pytest.fixture
def base(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    config = LlamaConfig(**SHAPE | dict(intermediate_size=448, vocab_size=320, max_position_embeddings=512))
    torch.manual_seed(0)
    model = Llama(config)
    model.initialize_(std=0.08)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # so that none is taken for another
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    save_checkpoint(model, tmp_path / "base", tokenizer_from=tiny_checkpoint)
    return tmp_path / "base"


def loaded(base: Path, weights: str = "bf16") -> Llama:
    quantize = None if weights == "bf16" else weights
    return load_model(base, torch.bfloat16, quantize=quantize).eval().requires_grad_(False)


def decoder_of(model: Llama, threads: int = 1) -> CPUDecoder:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    decoder = cpu_decoder(model)
    torch.set_num_threads(before)
    assert decoder is not None and decoder._all_tiled
    return decoder


def token_ids(rows: int, length: int) -> Tensor:
    return torch.randint(320, (rows, length), generator=torch.Generator().manual_seed(1))


def weight_of(layer: torch.nn.Module) -> Tensor:
    weight = layer.dequantize(torch.bfloat16) if isinstance(layer, QuantizedLinear) else layer.weight
    return weight.double()


def assert_rounded(found: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """bf16 of what was summed in fp32 over numbers whose absolute values sum up to `magnitude`."""
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= expected.abs() * 2**-8 + magnitude * 2**-20).all()


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4", "nf4", "nf4-dq"])
@pytest.mark.parametrize("tokens", [1, 32, 77, 1900])  # down_proj takes the last in two turns
def test_products_are_those_of_float64(base: Path, weights: str, tokens: int) -> None:
    model = loaded(base, weights)
    decoder, layer = decoder_of(model, threads=2), model.model.layers[1]
    torch.manual_seed(1)
    x, wide = torch.randn(1, tokens, 256).bfloat16(), torch.randn(tokens, 1, 448).bfloat16()
    for linear, states in ((layer.self_attn.k_proj, x), (layer.self_attn.o_proj, x), (layer.mlp.down_proj, wide)):
        weight = weight_of(linear)
        magnitude = states.double().abs() @ weight.abs().T
        assert_rounded(decoder._product(linear, states), states.double() @ weight.T, magnitude)
    gate, up = (x.double() @ weight_of(linear).T for linear in (layer.mlp.gate_proj, layer.mlp.up_proj))
    magnitude = x.double().abs() @ weight_of(layer.mlp.gate_proj).abs().T * (1 + up.abs())
    assert_rounded(decoder._gate_times_up(layer.mlp, x), torch.nn.functional.silu(gate) * up, magnitude)


@pytest.mark.parametrize("length", [1, 31, 64, 129])
def test_attention_is_that_of_float64(base: Path, length: int) -> None:
    decoder, capacity = decoder_of(loaded(base), threads=2), length + 5
    torch.manual_seed(1)
    queries = 2 * torch.randn(4, length, 64).bfloat16()
    keys, values = (2 * torch.randn(2, capacity, 64).bfloat16() for _ in range(2))
    keys[:, length:], values[:, length:] = torch.nan, torch.nan  # what lies behind the prompt is not looked at
    mixed = torch.empty(length, 4, 64, dtype=torch.bfloat16)
    pointers = [cpu_decode._pointer(tensor) for tensor in (queries, keys, values, mixed)]
    decoder.library.decoder_attend_prompt(decoder.handle, length, queries.stride(0), capacity, *pointers)
    seen_keys, seen_values = (tensor[:, :length].repeat_interleave(2, dim=0).double() for tensor in (keys, values))
    scores = queries.double() @ seen_keys.transpose(1, 2) / 8
    shares = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf).softmax(dim=-1)
    expected, magnitude = ((shares @ tensor).transpose(0, 1) for tensor in (seen_values, seen_values.abs()))
    # Shares are rounded to bf16 too.
    assert ((mixed.double() - expected).abs() <= expected.abs() * 2**-8 + magnitude * 2**-8).all()


@torch.inference_mode()
def read(model: Llama, ids: Tensor, threads: int = 1, padding: Tensor | None = None, pieces: int = 1) -> Tensor:
    """The hidden states of the last tokens (rows, hidden)."""
    cache = KVCache(model.config, len(ids), ids.shape[1] + 3, torch.bfloat16, padding=padding)
    decoder = decoder_of(model, threads)
    return [decoder.read(piece, cache) for piece in ids.chunk(pieces, dim=1)][-1]


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_a_prompt_is_no_further_from_the_truth_than_by_the_model_itself(base: Path, weights: str) -> None:
    model, truth, ids = loaded(base, weights), load_model(base, torch.float32).eval(), token_ids(3, 100)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            truth.get_submodule(name).weight = torch.nn.Parameter(weight_of(layer).float())
    with torch.inference_mode():
        expected, own = truth.model(ids)[:, -1], model.model(ids)[:, -1].float()
    for pieces in (1, 3):
        found = read(model, ids, pieces=pieces).float()
        assert 0 < (found - expected).abs().mean() <= (own - expected).abs().mean()


def test_rows_and_threads_change_nothing(base: Path) -> None:
    model, ids, padding = loaded(base), token_ids(3, 90), torch.tensor([0, 37, 64])
    together = read(model, ids, threads=3, padding=padding)
    for row, nothing in enumerate(padding.tolist()):
        assert torch.equal(read(model, ids[[row], nothing:])[0], together[row])


@pytest.mark.parametrize("quantize_cache", [None, "int8"])
@pytest.mark.parametrize("nothing", [[0, 0, 0], [80, 0, 37]])
@torch.inference_mode()
def test_one_call_does_what_many_do(base: Path, quantize_cache: str | None, nothing: list[int]) -> None:
    """Layer by layer, in pieces of which each goes on behind those before, and all at once: to the bit."""
    model, ids, padding = loaded(base), token_ids(3, 90), torch.tensor(nothing) if any(nothing) else None
    decoder, found = decoder_of(model, threads=2), []
    assert decoder._all_tiled
    for all_tiled, pieces in ((False, 1), (True, 1), (True, 3), (True, 18)):
        decoder._all_tiled = all_tiled
        cache = KVCache(model.config, 3, 100, torch.bfloat16, padding=padding, quantize=quantize_cache)
        hidden = [decoder.read(piece, cache) for piece in ids.chunk(pieces, dim=1)][-1]
        # Of what padding leaves behind it is enough that it is finite.
        lengths = [90 - padding for padding in nothing]
        held = [tensor[row, :, :length] for tensor in cache.tensors() for row, length in enumerate(lengths)]
        assert len(held) == 3 * (4 if quantize_cache is None else 8)
        assert all(tensor.isfinite().all() for tensor in (hidden, *cache.tensors()))
        found.append([hidden, *held])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


ADAPTERS = (dict(r=4, targets=["q_proj", "up_proj"]), dict(r=40), dict(r=8, targets=["gate_proj", "down_proj"]))


def save_random_adapter(base: Path, directory: Path, options: dict) -> None:
    model = load_model(base, torch.float32)
    inject_lora(model, LoRAConfig(**options))
    torch.manual_seed(1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, directory, base_model=str(base))


@pytest.mark.parametrize("options", ADAPTERS)
@pytest.mark.parametrize("weights", ["bf16", "int4"])
@torch.inference_mode()
def test_adapted_prompts_are_no_further_from_the_truth(base: Path, tmp_path: Path, weights: str, options: dict) -> None:
    model, truth, ids = loaded(base, weights), load_model(base, torch.float32), token_ids(2, 70)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            truth.get_submodule(name).weight = torch.nn.Parameter(weight_of(layer).float())
    before = truth.eval().model(ids)[:, -1]
    save_random_adapter(base, tmp_path / "adapter", options)
    for adapted in (model, truth):
        load_adapter(adapted, tmp_path / "adapter")
        adapted.eval()
    expected, own = truth.model(ids)[:, -1], model.model(ids)[:, -1].float()
    decoder = decoder_of(model)
    assert (expected - before).abs().mean() > 10 * (own - expected).abs().mean()
    for decoder._all_tiled in (True, False):
        cache = KVCache(model.config, 2, 70, torch.bfloat16)
        found = decoder.read(ids, cache).float()
        assert 0 < (found - expected).abs().mean() <= (own - expected).abs().mean() * (1 if decoder._all_tiled else 1.2)


@torch.inference_mode()
def test_rows_take_their_adapters_of_a_bank(base: Path, tmp_path: Path) -> None:
    for number, options in enumerate(ADAPTERS):
        save_random_adapter(base, tmp_path / "bank" / f"adapter {number}", options)
    model, ids, nothing = loaded(base), token_ids(6, 70), [0, 33, 0, 0, 64, 10]
    bank, _ = load_directory(model, tmp_path / "bank")
    chosen = ["adapter 2", None, "adapter 1", "adapter 1", "adapter 0", "adapter 2"]
    bank.select(chosen)
    together = read(model, ids, threads=2, padding=torch.tensor(nothing))
    for row, name in enumerate(chosen):
        bank.select(name)
        assert torch.equal(read(model, ids[[row], nothing[row] :])[0], together[row])
        alone = loaded(base)
        if name is not None:
            load_adapter(alone, tmp_path / "bank" / name)
        assert torch.equal(read(alone.eval(), ids[[row], nothing[row] :])[0], together[row])


def test_text_goes_on_with_a_cache_of_8_bits(base: Path) -> None:
    model = loaded(base)
    prepare_to_generate(model)
    prompts = [token_ids(1, length)[0].tolist() for length in (1, 200, 37, 130)]
    for quantize_cache in (None, "int8"):
        together = generate(model, prompts, 12, quantize_cache=quantize_cache)
        assert together == [generate(model, [prompt], 12, quantize_cache=quantize_cache)[0] for prompt in prompts]
