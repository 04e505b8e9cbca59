"""LoRA against PEFT on the same weights, and its contracts: nothing merged by accident, files PEFT opens."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lit_llama import LlamaConfig
from lit_llama.checkpoint import load_model
from lit_llama.errors import InputError
from lit_llama.lora import (
    LINEAR_NAMES,
    LoRAConfig,
    LoRALinear,
    inject_lora,
    load_adapter,
    lora_layers,
    merge_lora,
    save_adapter,
)
from lit_llama.model import Llama

CONFIGS = {
    "default": LoRAConfig(),
    "alpha and ranks": LoRAConfig(r=4, alpha=12, targets=["q_proj", "v_proj"], rank_per_target={"v_proj": 2}),
    "mlp": LoRAConfig(r=8, alpha=8, targets=["gate_proj", "down_proj"]),
    "rslora": LoRAConfig(r=16, alpha=8, rslora=True),
}


def with_adapter(checkpoint_dir: Path, config: LoRAConfig) -> Llama:
    """The tiny model with an adapter that does something."""
    model = load_model(checkpoint_dir, torch.float32)
    torch.manual_seed(1)
    inject_lora(model, config)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_opens_our_adapter_with_equal_logits_and_gradients(
    config: LoRAConfig, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = with_adapter(tiny_checkpoint, config)
    save_adapter(model, tmp_path, base_model=str(tiny_checkpoint))
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    ours, theirs = model(tokens()), peft(tokens()).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * len(list(lora_layers(model)))
    for name, layer in lora_layers(model):
        for side in "AB":
            own = getattr(layer, f"lora_{side}").grad
            other = gradients[f"base_model.model.{name}.lora_{side}.default.weight"]
            assert (own - other).abs().max() <= 1e-5 * other.abs().max(), name


def test_an_adapter_made_by_peft_opens_here(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    wanted = peft.LoraConfig(
        r=6, lora_alpha=3, target_modules=["k_proj", "up_proj"], rank_pattern={"up_proj": 3}, init_lora_weights=False
    )
    theirs = peft.get_peft_model(base, wanted)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tiny_checkpoint, torch.float32)
    load_adapter(ours, tmp_path)
    expected = theirs(tokens()).logits
    assert (ours(tokens()) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_training_starts_at_the_base_model(tiny_checkpoint: Path) -> None:
    base = load_model(tiny_checkpoint, torch.float32)
    expected = base(tokens())
    inject_lora(base, LoRAConfig())
    assert torch.equal(base(tokens()), expected)


def test_only_the_adapter_is_trainable_and_in_fp32(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, torch.bfloat16)
    inject_lora(model, LoRAConfig(r=4))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "smollm2-135m", "tinyllama-1.1b", "open-llama-3b"])
def test_parameter_counts_of_rank_16_on_all_layers(name: str) -> None:
    published = {
        "llama-2-7b": 39_976_960,
        "llama-3-8b": 41_943_040,
        "smollm2-135m": 4_884_480,
        "tinyllama-1.1b": 12_615_680,
        "open-llama-3b": 25_425_920,
    }
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_name(name))
    inject_lora(model, LoRAConfig(r=16))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == published[name]


def test_base_names_in_state_dicts_do_not_change(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_lora(model, LoRAConfig(r=4))
    after = model.state_dict()
    assert {name for name in after if "lora_" not in name} == set(before)
    model.load_state_dict(after)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_eval_and_training_mode_leave_the_base_alone(tiny_checkpoint: Path) -> None:
    model = with_adapter(tiny_checkpoint, LoRAConfig(r=4, dropout=0.3))
    before = {name: p.clone() for name, p in model.named_parameters()}
    evaluated = model.eval()(tokens())
    assert not torch.equal(model.train()(tokens()), evaluated)  # dropout acts
    assert torch.equal(model.eval()(tokens()), evaluated)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_dropout_touches_the_update_only_and_keeps_its_mean() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 32, bias=False), r=8, scaling=1.0, dropout=0.5).train()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 64)
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    exact = layer.eval()(x)
    assert (mean - exact).norm() <= 0.1 * (exact - layer.linear(x)).norm()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merging_keeps_the_logits(config: LoRAConfig, tiny_checkpoint: Path) -> None:
    model = with_adapter(tiny_checkpoint, config)
    expected = model(tokens())
    merge_lora(model)
    assert not list(lora_layers(model))
    assert (model(tokens()) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_typo_in_targets_is_named() -> None:
    with pytest.raises(InputError, match=r"'q_prj' .* q_proj, k_proj"):
        LoRAConfig(targets=["q_prj"])


def test_an_adapter_of_another_base_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_adapter(with_adapter(tiny_checkpoint, LoRAConfig(r=4)), tmp_path)
    other = load_model(tiny_checkpoint, torch.float32)
    other.fingerprint = "0" * 64
    with pytest.raises(InputError, match="trained on another base"):
        load_adapter(other, tmp_path)

    wider = Llama(LlamaConfig(128, 2, 4, 160, 320, num_key_value_heads=2))  # no fingerprint: the shapes tell
    with pytest.raises(InputError, match=r"has shape .* another base"):
        load_adapter(wider, tmp_path)


def test_unsupported_adapters_are_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_adapter(with_adapter(tiny_checkpoint, LoRAConfig(r=4)), tmp_path)
    path = tmp_path / "adapter_config.json"
    stated = json.loads(path.read_text())
    for change, name in (
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "peft_type"),
    ):
        path.write_text(json.dumps(stated | change))
        with pytest.raises(InputError, match=name):
            load_adapter(load_model(tiny_checkpoint, torch.float32), tmp_path)


def test_a_truncated_adapter_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_adapter(with_adapter(tiny_checkpoint, LoRAConfig(r=4)), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="adapter_model.safetensors: not a readable safetensors"):
        load_adapter(load_model(tiny_checkpoint, torch.float32), tmp_path)


def test_the_file_holds_the_adapter_and_nothing_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_adapter(with_adapter(tiny_checkpoint, LoRAConfig(r=4)), tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len(state) == 2 * len(LINEAR_NAMES) * 2  # two layers
    assert all(name.startswith("base_model.model.model.layers.") for name in state)
