"""AdamW in 32 and 8 bits against torch's and its own formula, its groups, and resuming to the bit."""

import builtins

import pytest
import torch
from torch import Tensor, nn

from lit_llama.errors import InputError
from lit_llama.optimizer import Optimizer

BETAS = (0.9, 0.95)
KINDS = ["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A matrix large enough for 8-bit states (4,096 elements) and parameters that are not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 8)).to(dtype)


def train(model: nn.Module, optimizer: Optimizer, first: int, last: int, learning_rate: float = 1e-2) -> None:
    for step in range(first, last):
        for part in range(2):  # micro-batches
            x = torch.randn(4, 128, generator=torch.Generator().manual_seed(2 * step + part))
            model(x.to(next(model.parameters()).dtype)).float().square().sum().backward()
            optimizer.collect_gradients()
        optimizer.clip_gradients(1.0)
        optimizer.step(learning_rate)


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_adamw_is_torchs() -> None:
    model, reference = small_model(), small_model()
    train(model, Optimizer(model, 0.1, BETAS), 0, 5)
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    others = [p for p in reference.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], 1e-2, BETAS, 1e-8, 0.1)
    for step in range(5):
        for part in range(2):
            x = torch.randn(4, 128, generator=torch.Generator().manual_seed(2 * step + part))
            reference(x).square().sum().backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    for own, other in zip(parameters(model), parameters(reference), strict=True):
        assert (own - other).abs().max() < 1e-6


def test_eight_bits_follow_thirty_two_and_take_a_quarter() -> None:
    models = {kind: small_model() for kind in ("adamw", "adamw-8bit")}
    optimizers = {kind: Optimizer(model, 0.1, BETAS, kind) for kind, model in models.items()}
    start = parameters(small_model())
    for kind, model in models.items():
        train(model, optimizers[kind], 0, 30, 1e-3)
    moved = [one - before for one, before in zip(parameters(models["adamw"]), start, strict=True)]
    apart = [one - other for one, other in zip(*map(parameters, models.values()), strict=True)]
    assert all(difference.norm() < 0.15 * distance.norm() for difference, distance in zip(apart, moved, strict=True))
    assert apart[0].norm() > 0  # 8 bits it is

    def state_bytes(kind: str) -> int:
        state = optimizers[kind].state_tensors()
        return sum(t.nbytes for name, t in state.items() if name.endswith("0.weight") and "parameter" not in name)

    assert state_bytes("adamw-8bit") < 0.27 * state_bytes("adamw")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimizer_goes_on_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    factors = {"0.weight": 4.0}
    whole, broken, resumed = (small_model(dtype) for _ in range(3))
    train(whole, Optimizer(whole, 0.1, BETAS, kind, factors), 0, 8)
    first = Optimizer(broken, 0.1, BETAS, kind, factors)
    train(broken, first, 0, 3)
    state = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
    assert ("state1.0.weight" in state) == kind.endswith("8bit")
    second = Optimizer(resumed, 0.1, BETAS, kind, factors)
    second.load_state_tensors(state)
    train(resumed, second, 3, 8)
    assert all(torch.equal(one, other) for one, other in zip(parameters(whole), parameters(resumed), strict=True))


def test_a_state_saved_before_the_first_step_is_a_fresh_start() -> None:
    whole, resumed = small_model(), small_model()
    train(whole, Optimizer(whole, 0.0, BETAS, "adamw-8bit"), 0, 2)
    optimizer = Optimizer(resumed, 0.0, BETAS, "adamw-8bit")
    state = {name: tensor.clone() for name, tensor in Optimizer(small_model(), 0.0, BETAS).state_tensors().items()}
    train(resumed, optimizer, 5, 6)
    optimizer.load_state_tensors(state)
    train(resumed, optimizer, 0, 2)
    assert all(torch.equal(one, other) for one, other in zip(parameters(whole), parameters(resumed), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_each_parameter_learns_at_its_share(kind: str) -> None:
    """The first step of Adam is the learning rate itself for every element, whatever the gradient."""
    model = small_model()
    before = parameters(model)
    train(model, Optimizer(model, 0.0, BETAS, kind, {"0.weight": 16.0, "1.bias": 0.1}), 0, 1, learning_rate=1e-3)
    for (name, after), start in zip(model.named_parameters(), before, strict=True):
        expected = 1e-3 * {"0.weight": 16.0, "1.bias": 0.1}.get(name, 1.0)
        assert (after - start).abs().median().item() == pytest.approx(expected, rel=1e-3), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_a_skipped_step_leaves_everything(kind: str, dtype: torch.dtype) -> None:
    model = small_model(dtype)
    optimizer = Optimizer(model, 0.1, BETAS, kind)
    train(model, optimizer, 0, 2)
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    for master in optimizer.masters.values():
        master.grad = torch.full_like(master, float("nan"))
    optimizer.step(1e-2, skip=torch.ones(()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state_tensors().items())
    assert all(master.grad is None for master in optimizer.masters.values())
    train(model, optimizer, 2, 3)
    assert not torch.equal(optimizer.state_tensors()["parameter.0.weight"], before["parameter.0.weight"])


def test_paging_without_cuda_is_said(capsys: pytest.CaptureFixture) -> None:
    Optimizer(small_model(), 0.0, BETAS, "paged-adamw-8bit")
    assert capsys.readouterr().err.splitlines() == [
        "note: optimizer states cannot be paged on cpu: train.optimizer is adamw-8bit here"
    ]


def test_bitsandbytes_is_asked_for_when_needed_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_bitsandbytes(name: str, *others: object) -> object:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real_import(name, *others)

    monkeypatch.setattr(builtins, "__import__", without_bitsandbytes)
    Optimizer(small_model(), 0.0, BETAS)
    with pytest.raises(InputError, match="train.optimizer adamw-8bit needs .* pip install bitsandbytes"):
        Optimizer(small_model(), 0.0, BETAS, "adamw-8bit")
