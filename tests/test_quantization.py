"""Quantized linear layers against published error bounds, bitsandbytes' codes and dense arithmetic."""

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.lora import LoRAConfig, LoRALinear, inject_lora
from lit_llama.loss import head_loss
from lit_llama.model import Llama
from lit_llama.quantization import QuantizedLinear

MODES = ["nf4", "nf4-dq", "int4", "int8"]


def saved_checkpoint(directory: Path, tied: bool) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(32, 2, 4, 64, vocab_size=90, tie_word_embeddings=tied)
    model = Llama(config)
    model.initialize_(std=0.3)
    save_checkpoint(model, directory / "checkpoint")
    return directory / "checkpoint"


@pytest.mark.parametrize("mode,mean_error,bits", [("nf4", 0.072798, 4.5), ("nf4-dq", 0.072937, 4.127)])
def test_nf4_error_and_size_are_the_published_ones(mode: str, mean_error: float, bits: float) -> None:
    # Mean absolute error on N(0, 1), 1024 x 1024, block 64: bitsandbytes' own tests (sd 7.4e-5), Dettmers et al. 2023.
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)
    layer = QuantizedLinear.from_weight(weight, mode)
    error = (layer.dequantize(torch.float32) - weight).abs()
    assert abs(error.mean() - mean_error) < 7 * 7.4e-5
    blocks = weight.view(-1, 64).abs().amax(1, keepdim=True)
    # Half the widest gap between levels; double quantization adds at most 1 % of the largest scale.
    bound = 0.15192 * blocks + (0.01 * blocks.max() if mode == "nf4-dq" else 0)
    assert (error.view(-1, 64) <= bound).all()
    stored = sum(b.numel() * b.element_size() for b in layer.buffers()) * 8 / weight.numel()
    assert stored == pytest.approx(bits, abs=0.01)


def test_int8_error_is_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 200)
    error = (QuantizedLinear.from_weight(weight, "int8").dequantize(torch.float32) - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


def test_int4_is_as_near_as_q4_1_of_llama_cpp() -> None:
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    weight = torch.randn(200, 320)
    weight[0], weight[1, :32] = 0, 0.37  # nothing to span
    peer = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1)
    peer = torch.from_numpy(gguf.quants.dequantize(peer, gguf.GGMLQuantizationType.Q4_1))
    layer = QuantizedLinear.from_weight(weight, "int4")
    error = (layer.dequantize(torch.float32) - weight).norm()
    assert 0.9 * (peer - weight).norm() < error < (peer - weight).norm()
    assert sum(b.numel() * b.element_size() for b in layer.buffers()) * 8 == 5 * weight.numel()
    # What came from such a file stays as it is, but for the rounding of a scale to bf16.
    again = QuantizedLinear.from_weight(peer, "int4").dequantize(torch.float32)
    assert (again - peer).norm() < 0.1 * error


def test_int4_is_computed_as_by_pytorchs_own_kernel() -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear.from_weight(torch.randn(64, 128), "int4")
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    codes = torch.stack((layer.codes >> 4, layer.codes & 15), dim=-1).flatten(1).int()
    scale, minimum = layer.scales.float(), layer.minima.float()
    scales_and_zeros = torch.stack((scale, minimum + 8 * scale), dim=-1).transpose(0, 1).contiguous().bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    peer = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales_and_zeros).float()
    assert (layer(x).float() - peer).norm() < 0.01 * peer.norm()


def test_int4_needs_whole_groups() -> None:
    with pytest.raises(InputError, match="a multiple of 32, not 52: use nf4 or int8"):
        QuantizedLinear.from_weight(torch.randn(8, 52), "int4")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(64, 128), (100, 52)])  # the second is no multiple of a block
def test_forward_and_gradient_equal_the_dequantized_weight(mode: str, shape: tuple[int, int]) -> None:
    shape = (100, 96) if mode == "int4" and shape[1] % 32 else shape
    torch.manual_seed(0)
    layer = QuantizedLinear.from_weight(torch.randn(shape), mode)
    weight = layer.dequantize(torch.float32)
    x = torch.randn(7, shape[1], requires_grad=True)
    grad_output = torch.randn(7, shape[0])
    for module in (layer.train(), layer.eval(), layer.train()):
        y = module(x)
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-6, atol=1e-5)
        (grad,) = torch.autograd.grad(y, x, grad_output)
        torch.testing.assert_close(grad, grad_output @ weight, rtol=1e-6, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(module(x), x @ weight.T, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_lora_over_a_quantized_layer_is_lora_over_its_dense_weight(mode: str) -> None:
    torch.manual_seed(0)
    quantized = QuantizedLinear.from_weight(torch.randn(96, 64), mode)
    dense = nn.Linear(64, 96, bias=False)
    dense.weight.data = quantized.dequantize(torch.float32)
    dense.requires_grad_(False)
    layers = [LoRALinear(linear, r=4, scaling=2.0, dropout=0.0) for linear in (quantized, dense)]
    nn.init.normal_(layers[0].lora_B)
    layers[1].load_state_dict({k: v for k, v in layers[0].state_dict().items() if "lora_" in k}, strict=False)
    x = torch.randn(5, 64, requires_grad=True)
    outputs = [layer(x) for layer in layers]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-5)
    gradients = [
        torch.autograd.grad(y.square().sum(), (x, layer.lora_A, layer.lora_B))
        for y, layer in zip(outputs, layers, strict=True)
    ]
    for own, other in zip(*gradients, strict=True):
        assert (own - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("mode", MODES)
def test_no_dense_weight_is_kept_for_the_backward(mode: str) -> None:
    layer = LoRALinear(QuantizedLinear.from_weight(torch.randn(256, 128), mode), r=4, scaling=1.0, dropout=0.0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = layer(torch.randn(3, 128, requires_grad=True))
    gc.collect()
    assert saved and all(shape.numel() < 256 * 128 for shape in saved)
    y.sum().backward()


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_codes_are_stable(mode: str) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear.from_weight(torch.randn(64, 64), "nf4")
    again = QuantizedLinear.from_weight(layer.dequantize(torch.float32), mode)
    assert torch.equal(layer.codes, again.codes)


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(InputError, match="'nf5' is not one of nf4, nf4-dq, int4, int8"):
        QuantizedLinear.from_weight(torch.randn(8, 8), "nf5")


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_in_int8(tied: bool, tmp_path: Path) -> None:
    checkpoint_dir = saved_checkpoint(tmp_path, tied)
    model = load_model(checkpoint_dir, torch.float32, embeddings="int8")
    plain = load_model(checkpoint_dir, torch.float32)
    assert tied == (model.lm_head is model.model.embed_tokens.table)
    for name in ("model.embed_tokens", "lm_head"):
        table = getattr(model.get_submodule(name), "table", model.get_submodule(name))
        plain.get_submodule(name).weight = nn.Parameter(table.dequantize(torch.float32))
    ids = torch.randint(0, 90, (2, 30))
    torch.testing.assert_close(model(ids), plain(ids))
    inject_lora(model, LoRAConfig(r=2))
    inject_lora(plain, LoRAConfig(r=2))
    for one, other in zip(model.parameters(), plain.parameters(), strict=False):
        assert one.device == other.device
    loss = head_loss(model.lm_head, model.model(ids), ids)
    torch.testing.assert_close(loss, head_loss(plain.lm_head, plain.model(ids), ids), rtol=1e-6, atol=0)
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.lora_B.grad.abs().max() > 0


def test_embedding_in_the_hosts_memory(tmp_path: Path) -> None:
    checkpoint_dir = saved_checkpoint(tmp_path, tied=False)
    model = load_model(checkpoint_dir, torch.float32, embeddings="cpu")
    ids = torch.randint(0, 90, (2, 30))
    assert torch.equal(model(ids), load_model(checkpoint_dir, torch.float32)(ids))
    model.to("meta")
    assert model.model.embed_tokens.weight.device.type == "cpu" and model.lm_head.weight.device.type == "meta"


def test_embeddings_that_cannot_be(tmp_path: Path) -> None:
    checkpoint_dir = saved_checkpoint(tmp_path, tied=True)
    with pytest.raises(InputError, match="use 'int8'"):
        load_model(checkpoint_dir, embeddings="cpu")
    with pytest.raises(InputError, match="'disk' is not one of int8, cpu"):
        load_model(checkpoint_dir, embeddings="disk")
