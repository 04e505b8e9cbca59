"""Dropout, DoRA, PiSSA, LoRA+ and training of embedding and head, each against autograd or PEFT on the same weights."""

import json
import os
import runpy
import signal
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script
from safetensors.torch import load_file
from test_lora import tokens, with_adapter
from test_training import arguments_for, train_adapter, write_store
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_llama.checkpoint import load_model
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore
from lit_llama.errors import InputError
from lit_llama.evaluation.perplexity import evaluate_loss
from lit_llama.lora import (
    LoRAConfig,
    adapter_parameters,
    inject_lora,
    learning_rate_factors,
    load_adapter,
    lora_layers,
    merge_lora,
    save_adapter,
)
from lit_llama.lora_linear import LoRALinear, dense_weight
from lit_llama.model import Llama
from lit_llama.packed_linear import PackedLinear, pack_linear_layers
from lit_llama.quantization import QuantizedLinear

merge = runpy.run_path(str(ROOT / "scripts/merge_lora.py"))["main"]


@pytest.fixture(scope="module")
def untied_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of its own."""
    from transformers import AutoConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("untied")
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(tiny_checkpoint, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tiny_checkpoint / name).read_bytes())
    return directory


def layer(mode: str | None = None, dtype: torch.dtype = torch.float32, **options: object) -> LoRALinear:
    """An adapted layer that does something, on a dense or a quantized base."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False).requires_grad_(False)
    base = QuantizedLinear.from_weight(linear.weight, mode) if mode else linear.to(dtype)
    adapted = LoRALinear(base, r=4, scaling=1.5, **{"dropout": 0.0, **options})
    nn.init.normal_(adapted.lora_B, std=0.1)
    if adapted.lora_magnitude_vector is not None:
        adapted.lora_magnitude_vector.detach().mul_(torch.rand(48) + 0.5)
    return adapted


def relative(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).abs().max() / second.double().abs().max())


def formula(adapted: LoRALinear, x: Tensor, mask: Tensor | float) -> Tensor:
    """The layer in plain operations for autograd, as PEFT writes it; `mask` is dropout's."""
    weight, dropped = dense_weight(adapted.linear, x.dtype), x * mask
    lora_A, lora_B = adapted.lora_A.to(x.dtype), adapted.lora_B.to(x.dtype)
    update = F.linear(F.linear(dropped, lora_A), lora_B) * adapted.scaling
    if adapted.lora_magnitude_vector is None:
        return F.linear(x, weight) + update
    norms = torch.linalg.norm(weight + adapted.scaling * lora_B @ lora_A, dim=1).detach()
    scale = adapted.lora_magnitude_vector.to(x.dtype) / norms
    return F.linear(x, weight) + (scale - 1) * F.linear(dropped, weight) + scale * update


def dropout_mask_of(adapted: LoRALinear, shape: tuple[int, ...], seed: int) -> Tensor:
    """The mask that the layer draws after `torch.manual_seed(seed)`, seen through a layer that shows its input."""
    probe = LoRALinear(nn.Linear(shape[-1], shape[-1], bias=False), shape[-1], 1.0, adapted.dropout).train()
    with torch.no_grad():
        probe.linear.weight.zero_()
        probe.lora_A.copy_(torch.eye(shape[-1]))
        probe.lora_B.copy_(torch.eye(shape[-1]))
        torch.manual_seed(seed)
        return probe(torch.ones(shape))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("mode", [None, "nf4", "int8"])
def test_output_and_gradients_are_those_of_autograd(mode: str | None, dora: bool, dropout: float) -> None:
    adapted = layer(mode, dora=dora, dropout=dropout).train()
    x = torch.randn(3, 7, 64, requires_grad=True)
    weights = torch.randn(3, 7, 48)
    mask = dropout_mask_of(adapted, (3, 7, 64), seed=5) if dropout else 1.0
    parameters = [x, *adapted.parameters()]
    assert len(parameters) == (4 if dora else 3) + (mode is None)

    torch.manual_seed(5)
    output = adapted(x)
    expected = formula(adapted, x, mask)
    learning = [p for p in parameters if p.requires_grad]
    gradients = torch.autograd.grad((output * weights).sum(), learning)
    wanted = torch.autograd.grad((expected * weights).sum(), learning)
    assert relative(output, expected) < 1e-6
    assert all(relative(own, other) < 1e-6 for own, other in zip(gradients, wanted, strict=True))


def test_gradients_with_dropout_are_the_derivative() -> None:
    adapted = layer(dropout=0.4).double().train()
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)

    def output(*_: Tensor) -> Tensor:
        torch.manual_seed(2)
        return adapted(x)

    assert torch.autograd.gradcheck(output, (x, adapted.lora_A, adapted.lora_B))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_gives_the_same_with_the_same_dropout_mask(dora: bool, tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = LoRAConfig(r=4, dropout=0.25, dora=dora, targets=["up_proj"], layers_to_transform=[1])
    model = with_adapter(tiny_checkpoint, config).train()
    save_adapter(model, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    ((_, adapted),) = lora_layers(model)

    class SameMask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * dropout_mask_of(adapted, tuple(x.shape), seed=9)

    theirs.base_model.model.model.layers[1].mlp.up_proj.lora_dropout["default"] = SameMask()
    torch.manual_seed(9)
    ours = model(tokens())
    expected = theirs(tokens()).logits
    assert relative(ours, expected) < 2e-6
    assert relative(ours, model.eval()(tokens())) > 1e-4  # dropout acts
    ours.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in adapter_parameters(model).items():
        assert relative(parameter.grad, gradients[name if name in gradients else f"{name}.weight"]) < 5e-6, name


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_saves_no_copy_of_its_input(dora: bool) -> None:
    adapted = layer(dropout=0.5, dora=dora).train()
    x = torch.randn(2, 9, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = adapted(x)
    large = [t for t in saved if t.numel() >= x.numel() // 2 and not isinstance(t, nn.Parameter)]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    output.sum().backward()


@pytest.mark.parametrize("dropout", [0.05, 0.3, 0.9])
def test_dropout_drops_its_share_everywhere(dropout: float) -> None:
    mask = dropout_mask_of(layer(dropout=dropout), (3001, 33), seed=1)  # elements that do not fill 64-bit words
    assert sorted(mask.unique().tolist()) == pytest.approx([0, 1 / (1 - dropout)], rel=1e-3)
    kept = (mask > 0).float()
    assert kept.mean().item() == pytest.approx(1 - dropout, abs=0.005)
    assert (kept.mean(0) - (1 - dropout)).abs().max() < 0.04
    assert torch.corrcoef(kept.T).fill_diagonal_(0).abs().max() < 0.1


def test_dropout_keeps_the_mean_and_draws_anew() -> None:
    adapted = layer(dropout=0.5).train()
    x = torch.randn(1, 64)
    outputs = torch.stack([adapted(x) for _ in range(4000)])
    assert not torch.equal(outputs[0], outputs[1])
    exact = adapted.eval()(x)
    assert (outputs.mean(0) - exact).norm() <= 0.1 * (exact - adapted.linear(x)).norm()


@pytest.mark.parametrize("mode", [None, "nf4-dq"])
def test_dora_in_bf16_is_near_fp32(mode: str | None) -> None:
    single, half = layer(mode, dora=True), layer(mode, torch.bfloat16, dora=True)
    x = torch.randn(32, 64)
    assert relative(half(x.bfloat16()), single(x)) < 0.02


# --- PiSSA


def test_pissa_is_pefts(tiny_checkpoint: Path) -> None:
    """The same factors but for their signs, so the same logits and gradients once ours have PEFT's signs."""
    config = LoRAConfig(r=6, alpha=9, targets=["q_proj", "down_proj"], init="pissa", rank_pattern={"q_proj": 3})
    model = load_model(tiny_checkpoint, torch.float32)
    unadapted = model(tokens())
    inject_lora(model, config)
    assert relative(model(tokens()), unadapted) < 2e-6

    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    options = {"target_modules": config.targets, "rank_pattern": config.rank_pattern}
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=6, lora_alpha=9, init_lora_weights="pissa", **options))
    parameters = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    own = adapter_parameters(model)
    for name, parameter in own.items():
        assert relative(parameter.abs(), parameters[name].abs()) < 1e-4, name
    with torch.no_grad():  # now both sides move on, by the same step from where they started
        for name, parameter in own.items():
            signs = (parameter * parameters[name]).sum(1 if "lora_A" in name else 0, keepdim=True).sign()
            parameter.copy_(parameters[name])
            step = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter += step
            parameters[name] += step
            path, side = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
            getattr(model.get_submodule(path), f"{side}_frozen").mul_(signs)
    ours, expected = model(tokens()), theirs(tokens()).logits
    assert relative(expected, unadapted) > 1e-2
    assert relative(ours, expected) < 1e-5
    ours.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in own.items():
        assert relative(parameter.grad, parameters[name].grad) < 2e-5, name


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize(("dtype", "quantize"), [("float32", None), ("bfloat16", None), ("bfloat16", "nf4")])
def test_a_pissa_adapter_is_served_on_the_original_base_to_the_bit(
    dtype: str, quantize: str | None, rslora: bool, dora: bool, init: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def base() -> Llama:
        return load_model(tiny_checkpoint, getattr(torch, dtype), quantize=quantize)

    model = base()
    torch.manual_seed(0)
    inject_lora(model, LoRAConfig(r=4, alpha=6, rslora=rslora, dora=dora, init=init, alpha_pattern={"o_proj": 3}))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.05 * torch.randn(parameter.shape)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in base().state_dict().items())
    trained = model(tokens())
    save_adapter(model, tmp_path)
    served = base()
    load_adapter(served, tmp_path)
    assert torch.equal(served(tokens()), trained)
    assert not torch.equal(base()(tokens()), trained)
    if quantize is None:
        theirs = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
        opened = peft.PeftModel.from_pretrained(theirs, tmp_path)(tokens()).logits
        assert relative(trained, opened) < (1e-5 if dtype == "float32" else 0.05)
        merge_lora(model.float())
        assert relative(model(tokens()), opened) < (1e-5 if dtype == "float32" else 0.05)


def test_a_pissa_adapter_as_peft_saves_it_opens_here(tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    options = {"target_modules": ["v_proj", "gate_proj"], "init_lora_weights": "pissa"}
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=4, **options))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tiny_checkpoint, torch.float32)
    load_adapter(ours, tmp_path)
    assert relative(ours(tokens()), theirs(tokens()).logits) < 1e-5


# --- embedding and head


def changed(checkpoint: Path, config: LoRAConfig, dtype: torch.dtype = torch.float32) -> Llama:
    """A model after some training: adapters do something, modules trained as a whole have moved."""
    model = load_model(checkpoint, dtype)
    torch.manual_seed(4)
    inject_lora(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape).to(parameter.dtype)
    return model


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]], ids="+".join)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_modules_to_save_are_pefts(
    tied: bool, names: list[str], tiny_checkpoint: Path, untied_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint if tied else untied_checkpoint
    model = changed(checkpoint, LoRAConfig(r=2, targets=["q_proj"], modules_to_save=names))
    whole = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert len(whole) == (1 if tied else len(names))
    save_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    input_ids = tokens().clamp_min(3)  # transformers gives the padding token's row of the embedding no gradient
    ours, expected = model(input_ids), theirs(input_ids).logits
    assert relative(ours, expected) < 2e-6

    ours.square().sum().backward()
    expected.square().sum().backward()
    gradients = {
        name.replace("modules_to_save.", "").replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    # PEFT keeps a tied weight under one of its two names.
    own = {name: p for name, p in adapter_parameters(model).items() if name in gradients}
    assert len(own) == len(gradients) == 4 + len(whole)
    assert all(relative(p.grad, gradients[name]) < 5e-6 for name, p in own.items())

    again = load_model(checkpoint, torch.float32)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(input_ids), ours)
    assert again.config.tie_word_embeddings == tied == (again.lm_head.weight is again.model.embed_tokens.weight)
    save_adapter(again, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["embedding", "head", "both", "both tied", "embedding and head adapted"],
)
def test_what_peft_trained_on_a_tied_base_opens_and_merges_here(
    options: dict, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, **{"target_modules": ["q_proj"], **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs(tokens()).logits
    model = load_model(tiny_checkpoint, torch.float32)
    load_adapter(model, tmp_path / "adapter")
    assert relative(model(tokens()), expected) < 2e-6
    merge(checkpoint_dir=tiny_checkpoint, adapter_dir=tmp_path / "adapter", out_dir=tmp_path / "merged")
    stays_tied = options.get("ensure_weight_tying", False)
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] == stays_tied
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(opened(tokens()).logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("options", "stays_tied"),
    [({"modules_to_save": ["embed_tokens"]}, True), ({"targets": ["v_proj", "lm_head"]}, False)],
    ids=["trained", "adapted head"],
)
def test_merging_into_a_tied_base_keeps_the_head(
    options: dict, stays_tied: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = changed(tiny_checkpoint, LoRAConfig(r=4, **options))
    save_adapter(model, tmp_path / "adapter")
    process = run_script(
        "scripts/merge_lora.py", "--checkpoint_dir", tiny_checkpoint, "--adapter_dir", tmp_path / "adapter",
        "--out_dir", tmp_path / "merged",
    )  # fmt: skip
    assert ("untied" in process.stderr) != stays_tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged/model.safetensors")) != stays_tied
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] == stays_tied
    expected = model(tokens())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(opened(tokens()).logits, expected) < 1e-5
    assert relative(load_model(tmp_path / "merged", torch.float32)(tokens()), expected) < 1e-5
    embedding = load_model(tmp_path / "merged", torch.float32).model.embed_tokens.weight
    assert torch.equal(embedding, model.model.embed_tokens.weight)


def test_a_trained_embedding_is_saved_in_the_precision_it_serves_in(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = changed(tiny_checkpoint, LoRAConfig(r=2, modules_to_save=["embed_tokens"]), torch.bfloat16)
    save_adapter(model, tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.lm_head.weight"].dtype == torch.bfloat16
    again = load_model(tiny_checkpoint, torch.bfloat16)
    load_adapter(again, tmp_path)
    assert torch.equal(again(tokens()), model(tokens()))


def test_a_head_of_another_base_is_refused(tiny_checkpoint: Path, untied_checkpoint: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["lm_head"])).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="lm_head.base_layer is not the head of this base"):
        load_adapter(load_model(untied_checkpoint, torch.float32), tmp_path)


def test_a_quantized_head_is_adapted_but_not_trained_or_merged(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, torch.float32)
    model.lm_head = QuantizedLinear.from_weight(model.lm_head.weight, "int8")
    with pytest.raises(InputError, match="lm_head is in int8 .* leave it out of lora.modules_to_save"):
        inject_lora(model, LoRAConfig(modules_to_save=["lm_head"]))
    before = model(tokens())
    inject_lora(model, LoRAConfig(r=2, targets=["lm_head"]))
    assert torch.equal(model(tokens()), before)
    with pytest.raises(InputError, match="lm_head is quantized: merge"):
        merge_lora(model)


def test_learning_rates_apart(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, torch.float32)
    assert learning_rate_factors(model) == {}
    options = {"plus_ratio": 16, "embedding_learning_rate": 0.2, "dora": True}
    inject_lora(model, LoRAConfig(r=2, targets=["q_proj"], modules_to_save=["lm_head"], **options))
    factors = learning_rate_factors(model)
    assert factors == {
        "model.embed_tokens.weight": 0.2,
        "model.layers.0.self_attn.q_proj.lora_B": 16,
        "model.layers.1.self_attn.q_proj.lora_B": 16,
    }


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 on this CPU")
@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}, {"targets": ["lm_head"]}], ids=str)
@torch.no_grad()
def test_layers_packed_for_generation_compute_the_same(options: dict, tiny_checkpoint: Path) -> None:
    model = changed(tiny_checkpoint, LoRAConfig(r=4, **options), torch.bfloat16)
    expected = model(tokens())
    pack_linear_layers(model)
    assert not list(lora_layers(model))
    assert len([module for module in model.modules() if isinstance(module, PackedLinear)]) == 2 * 7 + 1
    assert relative(model(tokens()), expected) < 0.02
    assert relative(load_model(tiny_checkpoint)(tokens()), expected) > 0.1


# --- whole runs

RUNS = {
    "dora": ({"dora": True, "dropout": 0.1}, {}, "nf4"),
    "pissa": ({"init": "pissa", "plus_ratio": 4, "rslora": True}, {"optimizer": "adamw-8bit"}, None),
    "embedding": ({"modules_to_save": ["embed_tokens"], "dropout": 0.1}, {"optimizer": "paged-adamw-8bit"}, "int8"),
    "head": ({"targets": ["q_proj", "lm_head"], "layers_to_transform": [1]}, {"optimizer": "paged-adamw"}, None),
}


@pytest.mark.parametrize(("lora", "options", "quantize"), RUNS.values(), ids=RUNS)
def test_a_run_reports_the_loss_of_its_adapter_and_resumes_to_the_bit(
    lora: dict, options: dict, quantize: str | None, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    stores = {"domain": write_store(tmp_path / "store", tiny_checkpoint, seed=0)}
    config = LoRAConfig(r=4, alpha=8, **lora)
    common = {"precision": "bf16", "train": {"max_steps": 6, "learning_rate": 3e-3, **options}}
    arguments = arguments_for(tiny_checkpoint, stores, tmp_path / "whole", **common)
    report = train_adapter(arguments, config, quantize)
    model = load_model(tiny_checkpoint, torch.bfloat16, quantize=quantize)
    load_adapter(model, tmp_path / "whole")
    windows = TrainingWindows(TokenStore.open(stores["domain"], "val"), 32, seed=0, shuffle=False)
    assert evaluate_loss(model, windows, 8).loss == report["after"]["val_loss"] < report["before"]["val_loss"]

    signals = [signal.SIGTERM]
    broken = {"out_dir": tmp_path / "broken", **common}
    with pytest.raises(SystemExit):
        train_adapter(
            arguments_for(tiny_checkpoint, stores, **broken),
            config,
            quantize,
            on_save=lambda: os.kill(os.getpid(), signals.pop()) if signals else None,
        )
    torch.manual_seed(12345)
    train_adapter(arguments_for(tiny_checkpoint, stores, resume=True, **broken), config, quantize)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_command_says_what_is_trained(tiny_checkpoint: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", tiny_checkpoint, seed=0)
    process = run_script(
        "pretrain/lora.py", "--checkpoint_dir", tiny_checkpoint, "--data_dir", store, "--out_dir", tmp_path / "run",
        "--train.max_steps", 2, "--train.sequence_length", 32, "--train.optimizer", "paged-adamw-8bit",
        "--lora.targets", "[q_proj, up_proj]", "--lora.rank_pattern", '{"layers.1.self_attn.q_proj": 2}',
        "--lora.modules_to_save", "[lm_head]", "--lora.init", "pissa", "--lora.dora", "true", "--lora.r", 4,
    )  # fmt: skip
    lines = process.stderr.splitlines()
    assert "adapting 4 layers with ranks 2 to 4; training embed_tokens and lm_head as one, 20,480 parameters" in lines
    assert "note: optimizer states cannot be paged on cpu: train.optimizer is adamw-8bit here" in lines
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "run")
    model = load_model(tiny_checkpoint, torch.float32)
    load_adapter(model, tmp_path / "run")
    assert relative(model(tokens()), opened(tokens()).logits) < 2e-6
