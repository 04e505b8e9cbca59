"""linear_cross_entropy against torch's own cross-entropy on full logits."""

import pytest
import torch
import torch.nn.functional as F

from lit_llama.loss import IGNORE_INDEX, head_loss, linear_cross_entropy
from lit_llama.quantization import QuantizedLinear


def problem(tokens: int = 150, hidden: int = 24, vocab: int = 211, dtype: torch.dtype = torch.float32) -> tuple:
    torch.manual_seed(0)
    h = torch.randn(3, tokens // 3, hidden).to(dtype).requires_grad_()
    w = (torch.randn(vocab, hidden) * 0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (3, tokens // 3))
    labels[torch.rand(labels.shape) < 0.3] = IGNORE_INDEX
    return h, w, labels


def plain(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, reduction: str) -> torch.Tensor:
    logits = (h @ w.T).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_value_and_gradients_equal_the_plain_loss(reduction: str, chunk_tokens: int) -> None:
    h, w, labels = problem()
    expected = plain(h, w, labels, reduction)
    expected_grads = torch.autograd.grad(expected, (h, w))
    loss = linear_cross_entropy(h, w, labels, reduction, chunk_tokens)
    grads = torch.autograd.grad(loss, (h, w))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).abs().max() <= 1e-6 * expected_grad.abs().max()


def test_frozen_head_and_scaled_loss() -> None:
    h, w, labels = problem()
    frozen = w.detach()
    (grad,) = torch.autograd.grad(linear_cross_entropy(h, frozen, labels) * 3, h)
    (expected,) = torch.autograd.grad(plain(h, frozen, labels, "mean") * 3, h)
    assert (grad - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_gradcheck_in_double_precision() -> None:
    h, w, labels = problem(tokens=12, hidden=5, vocab=13, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, chunk_tokens=5), (h, w))


def test_large_logits_stay_finite() -> None:
    h, w, labels = problem()
    loss = linear_cross_entropy(h * 1e4, w, labels)
    torch.testing.assert_close(loss, plain(h * 1e4, w, labels, "mean"), rtol=1e-5, atol=0)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (h, w)))


def test_bf16_is_as_close_to_double_as_the_plain_loss() -> None:
    h, w, labels = problem(tokens=300, hidden=64, vocab=1000, dtype=torch.bfloat16)
    exact = plain(h.double(), w.double(), labels, "mean")
    (exact_grad,) = torch.autograd.grad(exact, h)
    reference = F.cross_entropy((h @ w.T).float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    (reference_grad,) = torch.autograd.grad(reference, h)
    loss = linear_cross_entropy(h, w, labels)
    (grad,) = torch.autograd.grad(loss, h)
    assert abs(loss - exact) <= max(1.5 * abs(reference - exact), 1e-3)
    error, reference_error = ((g.double() - exact_grad.double()).norm() for g in (grad, reference_grad))
    assert error <= 1.5 * reference_error


def test_no_target_is_zero_loss_and_zero_gradient() -> None:
    h, w, labels = problem()
    loss = linear_cross_entropy(h, w, torch.full_like(labels, IGNORE_INDEX))
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (h, w)))


def test_logits_of_one_chunk_only_are_alive() -> None:
    h, w, labels = problem(tokens=3000, hidden=8, vocab=4000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        linear_cross_entropy(h, w.detach(), labels, chunk_tokens=50).backward()
    largest = max(event.self_cpu_memory_usage / event.count for event in profiler.key_averages() if event.count)
    full_logits = 3000 * 4000 * 4
    assert largest < full_logits / 20


@pytest.mark.parametrize("chunk_tokens", [7, 1000])
def test_lora_on_the_head(chunk_tokens: int) -> None:
    h, w, labels = problem()
    a, b = (torch.randn(4, 24) * 0.3).requires_grad_(), (torch.randn(211, 4) * 0.3).requires_grad_()
    expected = plain(h, w + 0.7 * b @ a, labels, "mean")
    expected_grads = torch.autograd.grad(expected, (h, w, a, b))
    loss = linear_cross_entropy(h, w, labels, chunk_tokens=chunk_tokens, update=(a, b, 0.7))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for grad, other in zip(torch.autograd.grad(loss, (h, w, a, b)), expected_grads, strict=True):
        assert (grad - other).abs().max() <= 1e-6 * max(1, other.abs().max())


def test_quantized_head_is_the_head_it_stands_for() -> None:
    torch.manual_seed(0)
    head = QuantizedLinear.from_weight(torch.randn(20_000, 24), "int8")  # more rows than are made dense at one time
    h = torch.randn(50, 24, requires_grad=True)
    labels = torch.randint(0, 20_000, (50,))
    dense = head.dequantize(torch.float32)
    expected = plain(h[None], dense, labels, "mean")
    torch.testing.assert_close(head(h), h @ dense.T)
    loss = head_loss(head, h, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, h)[0], torch.autograd.grad(expected, h)[0], rtol=1e-5, atol=1e-7
    )


def test_peak_memory_does_not_grow_with_the_vocabulary() -> None:
    def most_allocated_at_once(vocab: int) -> int:
        hidden, weight = torch.randn(4000, 16, requires_grad=True), torch.randn(vocab, 16)
        labels = torch.randint(0, vocab, (4000,))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            linear_cross_entropy(hidden, weight, labels).backward()
        allocations = [e.cpu_memory_usage for e in profiler.events() if e.name in ("aten::empty", "aten::softmax")]
        return max(allocations)

    assert most_allocated_at_once(120_000) <= 1.2 * most_allocated_at_once(30_000)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_a_teacher_s_probabilities_give_the_divergence_from_them(chunk_tokens: int) -> None:
    h, w, labels = problem(dtype=torch.float64)
    targets = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    top = torch.randn(len(targets), w.shape[0], dtype=torch.float64).softmax(1).topk(5)
    probabilities = top.values / top.values.sum(1, keepdim=True)
    full = torch.zeros(len(targets), w.shape[0], dtype=torch.float64).scatter(1, top.indices, probabilities)
    log_softmax = (h.flatten(0, 1)[targets] @ w.T).log_softmax(1)
    expected = F.kl_div(log_softmax, full, reduction="sum")
    loss = linear_cross_entropy(
        h, w, labels, "sum", chunk_tokens, targets=targets, teacher=(top.indices, probabilities)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for grad, exact in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(expected, (h, w)), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-9, atol=1e-12)


def test_a_teacher_that_is_sure_is_a_label() -> None:
    h, w, labels = problem()
    targets = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    ids = torch.cat((labels.flatten()[targets, None], torch.zeros(len(targets), 3, dtype=torch.int64)), dim=1)
    sure = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(len(targets), 4)
    loss = linear_cross_entropy(h, w, labels, targets=targets, teacher=(ids, sure))
    expected = linear_cross_entropy(h, w, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for grad, exact in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(expected, (h, w)), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-7)
