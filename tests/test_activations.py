"""What the forward pass keeps makes no difference to what is learnt: every setting against the plain one."""

from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from lit_llama.activations import ActivationConfig, apply_activation_config
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.lora import LoRAConfig, inject_lora
from lit_llama.loss import head_loss
from lit_llama.model import Llama

SETTINGS = {
    "all": ActivationConfig(checkpoint=1),
    "second": ActivationConfig(checkpoint=2),
    "tiled": ActivationConfig(mlp_tiles=3),
    "tiled-and-checkpointed": ActivationConfig(checkpoint=1, mlp_tiles=2),
    "offloaded": ActivationConfig(checkpoint=1, offload=True),
}


def small_model(dropout: float = 0.0, **changes: int) -> Llama:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 200, **changes,
    }  # fmt: skip
    model = Llama(LlamaConfig(**sizes))
    model.initialize_(std=0.1)
    inject_lora(model, LoRAConfig(r=4, dropout=dropout))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(length: int = 700) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 200, (2, length + 1), generator=generator)
    document_ids = (torch.rand(2, length, generator=generator) < 0.01).long().cumsum(1)
    return tokens[:, :-1], tokens[:, 1:], document_ids


def loss_and_gradients(model: Llama) -> tuple[Tensor, dict[str, Tensor]]:
    device = model.model.norm.weight.device
    input_ids, labels, document_ids = (tensor.to(device) for tensor in batch())
    torch.manual_seed(2)  # of dropout
    loss = head_loss(model.lm_head, model.model(input_ids, None, document_ids), labels)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def assert_equal_to_plain(model: Llama, plain: Llama) -> None:
    loss, gradients = loss_and_gradients(model)
    expected_loss, expected = loss_and_gradients(plain)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == expected.keys() and len(gradients) == 4 * 7 * 2
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-6 * max(1, expected[name].abs().max()), name


def unoptimized(model: Llama) -> Llama:
    for layer in model.model.layers:
        layer.mlp.recompute_cheap = False
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_losses_and_gradients_are_the_plain_ones(setting: str, dropout: float) -> None:
    model = small_model(dropout)
    apply_activation_config(model, SETTINGS[setting])
    assert_equal_to_plain(model, unoptimized(small_model(dropout)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_the_cheap_parts_changes_nothing(dropout: float) -> None:
    assert_equal_to_plain(small_model(dropout), unoptimized(small_model(dropout)))


def test_compiled_layers_are_compiled_once() -> None:
    model = small_model()
    apply_activation_config(model, SETTINGS["second"], compile_layers=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_equal_to_plain(model, unoptimized(small_model()))
    compiled = dict(torch._dynamo.utils.counters["frames"])
    assert compiled["ok"] > 0
    input_ids, labels, document_ids = batch()
    head_loss(model.lm_head, model.model(input_ids, None, document_ids.flip(0)), labels).backward()  # another mask
    assert torch._dynamo.utils.counters["frames"] == compiled


def bytes_kept(model: Llama) -> int:
    """Memory that the forward pass leaves allocated for the backward."""
    input_ids, _, _ = batch(length=512)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        hidden = model.model(input_ids)
    assert hidden.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def test_each_setting_keeps_less() -> None:
    kept = {"plain": bytes_kept(unoptimized(small_model())), "default": bytes_kept(small_model())}
    for name, config in SETTINGS.items():
        model = small_model()
        apply_activation_config(model, config)
        kept[name] = bytes_kept(model)
    assert kept["default"] < 0.75 * kept["plain"]
    assert kept["tiled"] < 0.75 * kept["default"]
    assert kept["second"] < 0.7 * kept["default"]
    assert kept["all"] < 0.25 * kept["default"]


@pytest.mark.parametrize("changes", [{"checkpoint": -1}, {"mlp_tiles": 0}])
def test_impossible_settings(changes: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"activations.{next(iter(changes))}"):
        ActivationConfig(**{**asdict(ActivationConfig()), **changes})
