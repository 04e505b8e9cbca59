"""What must hold on every kind of device; each test runs on the CPU and on CUDA where there is one."""

import pytest
import torch
from test_activations import batch, loss_and_gradients, small_model, unoptimized
from torch import Tensor, nn

from lit_llama.activations import ActivationConfig, apply_activation_config
from lit_llama.data.layouts import IGNORE_INDEX
from lit_llama.loss import head_loss
from lit_llama.model import Llama
from lit_llama.optimizer import Optimizer
from lit_llama.quantization import QuantizedLinear

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def packed(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(input_ids, labels, position_ids, document_ids) of two rows of documents of many lengths."""
    input_ids, labels, document_ids = (tensor.to(device) for tensor in batch(length=512))
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    positions = torch.arange(512, device=device).expand_as(document_ids)
    position_ids = positions - torch.where(starts, positions, 0).cummax(dim=1).values
    labels = torch.where(starts.roll(-1, dims=1), IGNORE_INDEX, labels)  # no target in the next document
    return input_ids, labels, position_ids, document_ids


def test_a_document_does_not_see_its_neighbours(device: str) -> None:
    model = small_model().to(device).eval()
    input_ids, _, position_ids, document_ids = packed(device)
    changed_document = int(document_ids[0].max()) // 2
    changed = (document_ids == changed_document) & (torch.arange(2, device=device) == 0)[:, None]
    with torch.no_grad():
        before = model(input_ids, position_ids, document_ids)
        after = model(torch.where(changed, (input_ids + 1) % 200, input_ids), position_ids, document_ids)
    assert changed.sum() > 10
    assert not torch.equal(before[changed], after[changed])
    assert torch.equal(before[~changed], after[~changed])  # to the bit


def test_the_loss_of_packed_documents_is_theirs_one_by_one(device: str) -> None:
    model = small_model().to(device)
    input_ids, labels, position_ids, document_ids = packed(device)
    loss = head_loss(model.lm_head, model.model(input_ids, position_ids, document_ids), labels, "sum")
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = torch.zeros((), device=device)
    for row in range(2):
        for document in document_ids[row].unique():
            part = document_ids[row] == document
            alone = head_loss(model.lm_head, model.model(input_ids[row, part][None]), labels[row, part][None], "sum")
            alone.backward()
            total += alone.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        expected = model.get_parameter(name).grad
        assert (gradient - expected).abs().max() <= 1e-5 * max(1, expected.abs().max()), name


@pytest.mark.parametrize(
    "activations",
    [ActivationConfig(offload=True), ActivationConfig(checkpoint=1, offload=True), ActivationConfig(2, 3, True)],
    ids=["offload", "checkpoint-offload", "everything"],
)
def test_activation_settings_change_nothing(activations: ActivationConfig, device: str) -> None:
    model, plain = small_model(0.2).to(device), unoptimized(small_model(0.2)).to(device)
    apply_activation_config(model, activations)
    loss, gradients = loss_and_gradients(model)
    expected_loss, expected = loss_and_gradients(plain)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * max(1, expected[name].abs().max()), name


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int4", "int8"])
def test_quantized_on_the_device_as_on_the_cpu(mode: str, device: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    on_cpu = QuantizedLinear.from_weight(weight, mode).dequantize(torch.float32)
    layer = QuantizedLinear.from_weight(weight.to(device), mode)
    torch.testing.assert_close(layer.dequantize(torch.float32).cpu(), on_cpu, rtol=1e-3, atol=1e-3)
    x = torch.randn(5, 64, device=device, requires_grad=True)
    torch.testing.assert_close(layer(x), x @ layer.dequantize(torch.float32).T, rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(layer(x).sum(), x)[0].abs().max() > 0


@needs_cuda
def test_a_step_waits_for_nothing() -> None:
    model: Llama = small_model().to("cuda")
    optimizer = Optimizer(model, 0.0, (0.9, 0.95))
    input_ids, labels, position_ids, document_ids = packed("cuda")
    targets = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)

    def step() -> None:
        hidden = model.model(input_ids, position_ids, document_ids)
        head_loss(model.lm_head, hidden, labels, targets=targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(1e-4)

    step()  # compiles flex attention
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
