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
    adapter_parameters,
    inject_lora,
    load_adapter,
    lora_layers,
    merge_lora,
    save_adapter,
)
from lit_llama.model import Llama

CONFIGS = {
    "default": LoRAConfig(),
    "alpha and ranks": LoRAConfig(r=4, alpha=12, targets=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
    "mlp": LoRAConfig(r=8, alpha=8, targets=["gate_proj", "down_proj"]),
    "rslora": LoRAConfig(r=16, alpha=8, rslora=True),
    "dora": LoRAConfig(r=4, alpha=8, dora=True),
    "patterns": LoRAConfig(
        r=4,
        alpha=4,
        rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 2, r"layers\.0\..*_proj": 5, "up_proj": 3},
        alpha_pattern={"model.layers.0.mlp.gate_proj": 5, "o_proj": 1.5},
    ),
    "one layer": LoRAConfig(r=4, dora=True, layers_to_transform=[1]),
    "head": LoRAConfig(r=4, targets=["v_proj", "lm_head"], layers_to_transform=[0]),
}


def with_adapter(checkpoint_dir: Path, config: LoRAConfig) -> Llama:
    """The tiny model with an adapter that does something."""
    model = load_model(checkpoint_dir, torch.float32)
    torch.manual_seed(1)
    inject_lora(model, config)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.detach().mul_(torch.rand(len(layer.lora_magnitude_vector)) + 0.5)
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
    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in peft.named_parameters() if p.requires_grad}
    own = adapter_parameters(model)
    assert len(own) == len(gradients)
    for name, parameter in own.items():
        other = gradients[name if name in gradients else f"{name}.weight"]
        assert (parameter.grad - other).abs().max() <= 2e-6 * other.abs().max(), name

    again = load_model(tiny_checkpoint, torch.float32)
    load_adapter(again, tmp_path)
    assert torch.equal(again(tokens()), ours)
    save_adapter(again, tmp_path / "again", base_model=str(tiny_checkpoint))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["k_proj", "up_proj"], "rank_pattern": {"up_proj": 3}},
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\..*": 2},
            "alpha_pattern": {"q_proj": 9},
        },
        {"target_modules": ["k_proj", "up_proj"], "use_dora": True, "layers_to_transform": 1},
        {"target_modules": ["lm_head", "q_proj"], "use_rslora": True},
    ],
    ids=["ranks", "patterns", "dora", "head"],
)
def test_an_adapter_made_by_peft_opens_here(options: dict, tiny_checkpoint: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=6, lora_alpha=3, init_lora_weights=False, **options))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tiny_checkpoint, torch.float32)
    unadapted = ours(tokens())
    load_adapter(ours, tmp_path)
    expected = theirs(tokens()).logits
    assert (unadapted - expected).abs().max() > 1e-3 * expected.abs().max()
    assert (ours(tokens()) - expected).abs().max() <= 2e-6 * expected.abs().max()


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


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merging_keeps_the_logits(config: LoRAConfig, tiny_checkpoint: Path) -> None:
    model = with_adapter(tiny_checkpoint, config)
    expected = model(tokens())
    merge_lora(model)
    assert not list(lora_layers(model))
    assert not any(p.requires_grad for p in model.parameters())
    assert (model(tokens()) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_prj"]}, r"'q_prj' .* q_proj, k_proj"),
        ({"modules_to_save": ["norm"]}, r"'norm' .* embed_tokens, lm_head"),
        ({"targets": ["lm_head"], "modules_to_save": ["lm_head"]}, "name it in one of them"),
        ({"targets": ["lm_head"], "dora": True}, "do not go with lm_head"),
        ({"init": "pissa_niter"}, "pissa_niter_<number>"),
        ({"rank_pattern": {"(q_proj": 2}}, "not a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "at least 1"),
        ({"plus_ratio": 0}, "above 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_options_that_cannot_be_are_named(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRAConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_to_transform": [0, 2]}, "names layer 2; the model has 2"),
        ({"targets": ["q_proj"], "rank_pattern": {"k_proj": 2}}, "'k_proj' matches no adapted layer"),
        ({"targets": ["lm_head"], "modules_to_save": ["embed_tokens"]}, "this base ties lm_head to embed_tokens"),
        ({"init": "pissa", "r": 65}, "rank 65 is more than"),
    ],
    ids=["layer", "pattern", "tied", "rank"],
)
def test_options_that_do_not_fit_the_model_are_named(options: dict, message: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match=message):
        inject_lora(load_model(tiny_checkpoint, torch.float32), LoRAConfig(**options))


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
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
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
