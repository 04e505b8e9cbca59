"""The memory estimate against what PyTorch allocates, and against published parameter counts and figures."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file
from test_activations import bytes_kept, small_model, unoptimized
from test_training import arguments_for, train_adapter, write_store

from lit_llama.activations import ActivationConfig, apply_activation_config
from lit_llama.config import LlamaConfig
from lit_llama.errors import RunError
from lit_llama.lora import LoRAConfig
from lit_llama.memory_estimate import TrainingSetup, estimate_memory, fitting_setups, longest_sequence, peak
from lit_llama.optimizer import Optimizer
from lit_llama.training_step import LossOfBatch

SMALL = TrainingSetup(
    LoRAConfig(r=4), micro_batch_size=2, sequence_length=512, dtype=torch.float32, device_type="cpu"
)  # the batch of `bytes_kept`


@pytest.mark.parametrize(
    "activations",
    [ActivationConfig(), ActivationConfig(checkpoint=1), ActivationConfig(checkpoint=2), ActivationConfig(mlp_tiles=2)],
    ids=["default", "all", "second", "tiled"],
)
def test_activations_are_what_the_forward_pass_leaves_allocated(activations: ActivationConfig) -> None:
    model = small_model()
    apply_activation_config(model, activations)
    estimate = estimate_memory(model.config, replace(SMALL, activations=activations))["activations"]
    kept = bytes_kept(model)
    hidden = 2 * 512 * 48 * 4  # embeddings' output, final norm's input and output, rotary tables: once, not a layer
    assert estimate == pytest.approx(kept, rel=0.02, abs=4 * hidden)
    assert kept < bytes_kept(unoptimized(small_model()))


def test_adapter_gradients_and_optimizer_are_the_bytes_of_their_tensors() -> None:
    model = small_model()
    optimizer = Optimizer(model, 0.0, (0.9, 0.95))
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    parts = estimate_memory(model.config, SMALL)
    assert parts["gradients"] == sum(p.grad.nbytes for p in optimizer.parameters.values())
    optimizer.step(1e-3)
    state = optimizer.state_tensors()
    assert parts["adapter"] == sum(t.nbytes for name, t in state.items() if name.startswith("parameter."))
    assert parts["optimizer"] == sum(t.nbytes for name, t in state.items() if name.startswith("exp_avg"))
    assert parts["weights"] == sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def test_weights_of_known_models() -> None:
    # Llama-3-8B in GiB, bf16 and NF4 with double quantization, embeddings in bf16: 14.96 -> 5.31
    config = LlamaConfig.from_name("llama-3-8b")
    for quantize, gib in ((None, 14.96), ("nf4-dq", 5.31)):
        weights = estimate_memory(config, TrainingSetup(quantize=quantize))["weights"]
        assert weights / 2**30 == pytest.approx(gib, abs=0.01)


def test_every_switch_saves_memory() -> None:
    config = LlamaConfig.from_name("llama-3.1-8b")
    plain = TrainingSetup(micro_batch_size=1, sequence_length=4096)
    lighter = [
        replace(plain, quantize="nf4-dq"),
        replace(plain, activations=ActivationConfig(checkpoint=1)),
        replace(plain, activations=ActivationConfig(mlp_tiles=4)),
        replace(plain, embeddings="int8"),
        replace(plain, embeddings="cpu"),
        replace(plain, optimizer="adamw-8bit"),
        replace(plain, sequence_length=2048),
    ]
    assert all(peak(config, setup) < peak(config, plain) for setup in lighter)
    checkpointed = replace(plain, activations=ActivationConfig(checkpoint=1))
    offloaded = replace(plain, activations=ActivationConfig(checkpoint=1, offload=True))
    assert peak(config, offloaded) < peak(config, checkpointed)


def test_proposals_fit_and_begin_with_the_least_change() -> None:
    config = LlamaConfig.from_name("llama-3.1-8b")
    setup = TrainingSetup(micro_batch_size=4, sequence_length=2048)
    assert next(fitting_setups(config, setup, 200 * 10**9)) == setup
    for budget in (24 * 10**9, 8 * 10**9):
        proposals = list(fitting_setups(config, setup, budget))
        assert proposals and all(peak(config, proposal) <= budget for proposal in proposals)
    assert not list(fitting_setups(config, setup, 10**9))
    length = longest_sequence(config, replace(setup, micro_batch_size=1), 24 * 10**9)
    at_most = replace(setup, micro_batch_size=1, sequence_length=length)
    assert peak(config, at_most) <= 24 * 10**9 < peak(config, replace(at_most, sequence_length=length + 128))


def test_script(tiny_checkpoint: Path) -> None:
    table = run_script("scripts/estimate_memory.py", "--model", "llama-3.1-8b", "--quantize", "nf4-dq", "--card_gb", 24)
    assert "activations" in table.stdout and "longest window" in table.stdout
    result = run_script(
        "scripts/estimate_memory.py", "--checkpoint_dir", tiny_checkpoint, "--json_output", "true", "--device", "cpu"
    )
    content = json.loads(result.stdout)
    assert content["peak"] == sum(content["parts"].values()) > 0
    process = subprocess.run(
        [sys.executable, ROOT / "scripts/estimate_memory.py"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2 and "--checkpoint_dir or --model" in process.stderr


def test_out_of_memory_ends_with_a_proposal_and_the_run_resumes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = {"domain": write_store(tmp_path / "domain", tiny_checkpoint, seed=0)}
    train_adapter(arguments_for(tiny_checkpoint, stores, tmp_path / "whole"))
    forward, calls = LossOfBatch.forward, []

    def out_of_memory_at_the_ninth(self: LossOfBatch, *batch: torch.Tensor) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 9:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 1 TB")
        return forward(self, *batch)

    monkeypatch.setattr(LossOfBatch, "forward", out_of_memory_at_the_ninth)
    with pytest.raises(RunError, match="out of memory on cpu at about .* go on with --resume true and --train.micro_b"):
        train_adapter(arguments_for(tiny_checkpoint, stores, tmp_path / "broken"))
    resumed = arguments_for(
        tiny_checkpoint, stores, tmp_path / "broken", resume=True, train={"micro_batch_size": 1},
        activations=ActivationConfig(checkpoint=1),
    )  # fmt: skip
    train_adapter(resumed)
    whole, broken = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    for name, tensor in whole.items():
        torch.testing.assert_close(broken[name], tensor, rtol=1e-4, atol=1e-4)
