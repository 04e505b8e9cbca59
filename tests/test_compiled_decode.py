"""The compiled step against the model's own, and how often it is compiled."""

from pathlib import Path

import pytest
import torch
from conftest import write_adapters
from torch._dynamo.utils import counters

from lit_llama.adapters import load_directory
from lit_llama.checkpoint import load_model
from lit_llama.compiled_decode import compiled_decoder
from lit_llama.config import LlamaConfig
from lit_llama.generation import generate, prepare_to_generate
from lit_llama.kv_cache import KVCache
from lit_llama.lora import LoRAConfig, inject_lora, lora_layers
from lit_llama.model import Llama

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> None:
    torch._dynamo.reset()
    counters.clear()


def random_model(device: str, **changes: object) -> Llama:
    shape = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=320)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**shape | dict(intermediate_size=128, max_position_embeddings=256) | changes))
    model.initialize_(std=0.15)
    inject_lora(model, LoRAConfig(r=4))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.to(device).eval().requires_grad_(False)


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_rows_memory_and_guesses_are_symbols(device: str) -> None:
    """Once for one row and once for more, with several tokens a step once more; whatever the memory of the cache is."""
    model = random_model(device, sliding_window=24, model_type="mistral")
    ids = torch.randint(320, (3, 100), generator=torch.Generator().manual_seed(1)).to(device)
    lengths = [10, *[1] * 40, 3, 3, 2, *[1] * 38, 4]
    expected: dict[int, list[torch.Tensor]] = {}
    for rows in (1, 2, 3):
        cache = KVCache(model.config, rows, 100, torch.float32, device, quantize="int8")
        expected[rows] = [model(piece, cache=cache) for piece in ids[:rows].split(lengths, dim=1)]
    decoder = compiled_decoder(model)
    assert not list(lora_layers(model))  # merged
    for rows, compiled in ((1, 2), (3, 4), (2, 4)):
        cache = KVCache(model.config, rows, 100, torch.float32, device, quantize="int8")
        pieces = ids[:rows].split(lengths, dim=1)
        decoder.read(pieces[0], cache)
        for piece, wanted in zip(pieces[1:], expected[rows][1:], strict=True):
            # A key or value near the middle of two codes may take the other one.
            assert (decoder(piece.contiguous(), cache) - wanted).norm() < 0.01 * wanted.norm()
        assert cache.length == 100 and counters["stats"]["unique_graphs"] == compiled
    assert not counters["graph_break"]


@pytest.mark.parametrize("quantize", ["nf4-dq", "int4"])
@pytest.mark.parametrize("device", DEVICES)
def test_text_over_quantized_weights(device: str, quantize: str, tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, torch.float32, device, quantize=quantize).eval()
    inject_lora(model, LoRAConfig(r=4))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    model.eval().requires_grad_(False)
    prompts = [[5, 6, 7], [9] * 20, [11, 12]]
    expected = generate(model, prompts, 30)
    model.decoder = compiled_decoder(model)
    assert generate(model, prompts, 30) == expected
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    # As another process would, it finds what was compiled.
    torch._dynamo.reset()
    counters.clear()
    assert generate(model, prompts, 30) == expected
    assert counters["inductor"]["fxgraph_cache_hit"] == 1


def test_what_chooses_an_adapter_by_row_goes_without(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = load_model(tiny_checkpoint, torch.float32, quantize="nf4").eval()
    load_directory(model, write_adapters(tiny_checkpoint, tmp_path / "adapters", "lakes"))
    prepare_to_generate(model, compile=True)
    assert model.decoder is None
    assert "not compiled: a bank of adapters" in capsys.readouterr().err
