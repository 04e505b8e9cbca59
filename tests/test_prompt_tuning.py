"""Prefix tuning and LLaMA-Adapter against PEFT, the formulas, and what they do to one document at a time."""

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_llama.activations import ActivationConfig, apply_activation_config
from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.config import LlamaConfig
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError
from lit_llama.evaluation.perplexity import evaluate_loss
from lit_llama.functional import AttentionFunction, CausalMask
from lit_llama.generation import generate
from lit_llama.lora import LoRAConfig, inject_lora
from lit_llama.loss import head_loss
from lit_llama.model import Llama
from lit_llama.packed_linear import pack_linear_layers
from lit_llama.prompt_tuning import (
    LlamaAdapterConfig,
    PrefixConfig,
    inject_llama_adapter,
    inject_prefix,
    load_prompt_tuning,
    save_prompt_tuning,
)
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, EvalConfig, TrainConfig, TrainingArguments, start_fabric, train

KINDS = {
    "prefix": PrefixConfig(5, "random"),
    "v1": LlamaAdapterConfig(1, 7, layers=2),
    "v2": LlamaAdapterConfig(2, 7),
}
IN_PEFT = ["prefix", "v1"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 3 layers whose attention is not uniform."""
    directory = tmp_path_factory.mktemp("checkpoint") / "lively"
    torch.manual_seed(0)
    config = LlamaConfig(64, 3, 4, 160, 320, num_key_value_heads=2, max_position_embeddings=1024)
    model = Llama(config)
    model.initialize_(std=0.12)
    save_checkpoint(model, directory, tokenizer_from=tiny_checkpoint)
    return directory


def inject(model: Llama, kind: str) -> Llama:
    config = KINDS[kind]
    inject_prefix(model, config) if kind == "prefix" else inject_llama_adapter(model, config)
    return model


def tuned(checkpoint_dir: Path, kind: str, dtype: torch.dtype = torch.float32, quantize: str | None = None) -> Llama:
    """A model with an adapter that does something."""
    model = load_model(checkpoint_dir, dtype, quantize=quantize)
    torch.manual_seed(1)
    inject(model, kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.8)
            elif parameter.requires_grad and not name.endswith(("prefix", "prompt")):
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def tokens(length: int = 40, seed: int = 2) -> Tensor:
    return torch.randint(3, 320, (2, length), generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def base_in_transformers(checkpoint_dir: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32).eval()


# --- against PEFT


@pytest.mark.parametrize("kind", IN_PEFT)
def test_peft_opens_ours_with_equal_logits_gradients_and_text(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = tuned(checkpoint, kind)
    save_prompt_tuning(model, tmp_path, base_model=str(checkpoint))
    peft = PeftModel.from_pretrained(base_in_transformers(checkpoint), tmp_path).eval()
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("prompt_encoder" in name or "adaption_" in name)
    ours, theirs = model(tokens()), peft(tokens()).logits
    assert relative_error(ours, load_model(checkpoint, torch.float32)(tokens())) > 0.1
    assert relative_error(ours, theirs) <= 2e-6

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients = {name.rpartition("layers.")[2].replace(".attend", ""): p.grad for name, p in trained(model).items()}
    others = {name.rpartition("layers.")[2]: p.grad for name, p in trained(peft).items()}
    if kind == "prefix":
        (whole,) = others.values()
        # PEFT: token, then layer, then key or value, then head
        split = whole.view(5, 3, 2, 2, 16)
        others = {f"{i}.self_attn.prefix": split[:, i].permute(1, 2, 0, 3) for i in range(3)}
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, others[name]) <= 1e-5, name

    prompt = tokens()[:1, :9]
    expected = peft.generate(input_ids=prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 9:].tolist()
    assert generate(model, prompt, 20) == [expected]
    assert generate(load_model(checkpoint, torch.float32), prompt, 20) != [expected]


@pytest.mark.parametrize("kind", IN_PEFT)
def test_an_adapter_made_by_peft_opens_here(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    import peft

    config = {
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
        "v1": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
    }[kind]
    theirs = peft.get_peft_model(base_in_transformers(checkpoint), config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("adaption_gate"):
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ours = load_model(checkpoint, torch.float32)
    unadapted = ours(tokens())
    load_prompt_tuning(ours, tmp_path)
    expected = theirs(tokens()).logits
    assert relative_error(unadapted, expected) > 0.01
    assert relative_error(ours(tokens()), expected) <= 2e-6


def test_version_2_is_version_1_with_bias_scale_and_norms(checkpoint: Path, tmp_path: Path) -> None:
    """The formula put on transformers' layers by hooks, around PEFT's version 1."""
    from peft import PeftModel

    model = tuned(checkpoint, "v2")
    save_prompt_tuning(model, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    prompts = {name: tensor for name, tensor in state.items() if ".adaption_" in name}
    save_file(prompts, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(description | {"peft_type": "ADAPTION_PROMPT"}))
    peft = PeftModel.from_pretrained(base_in_transformers(checkpoint), tmp_path, is_trainable=True).eval()

    leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in state.items() if name not in prompts}
    for name, module in peft.named_modules():
        short = name.replace("self_attn.model.", "self_attn.")  # PEFT's wrapper of the attention is one level more
        if f"{short}.adapter_scale" in leaves:
            scale, bias = leaves[f"{short}.adapter_scale"], leaves[f"{short}.adapter_bias"]
            bias = bias / 2 if name.endswith("self_attn.model.o_proj") else bias  # PEFT calls it twice and adds up
            module.register_forward_hook(lambda module, _, y, scale=scale, bias=bias: scale * (y + bias))
        elif f"{short}.weight" in leaves:
            del module.weight
            module.weight = leaves[f"{short}.weight"]
    assert len(leaves) == 3 * (7 * 2 + 2) + 1

    ours, theirs = model(tokens()), peft(tokens()).logits
    assert relative_error(ours, theirs) <= 2e-6
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    own = trained(model)
    assert len(own) == len(state) and all(parameter.grad is not None for parameter in own.values())
    for name, leaf in leaves.items():
        parameter = own[name.removeprefix("base_model.model.")]
        assert relative_error(parameter.grad, leaf.grad) <= 1e-5, name


# --- the attention behind it


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_documents", [False, True])
def test_gradients_of_attention_with_a_prefix_by_finite_differences(
    window: int | None, with_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_llama.functional.QUERY_BLOCK", 3)  # three blocks in a sequence short enough for this
    torch.manual_seed(0)
    document_ids = torch.tensor([[0] * 5 + [1] * 3, [0] * 2 + [1] * 2 + [2] * 4]) if with_documents else None
    mask = CausalMask(8, document_ids, window, torch.device("cpu")).behind(2)
    for row in range(2):
        for query in range(8):
            for key in range(8):
                visible = key <= query and (window is None or key > query - window)
                if document_ids is not None:
                    visible = visible and bool(document_ids[row, key] == document_ids[row, query])
                assert mask.dense.expand(2, 1, 8, 10)[row, 0, query, 2 + key] == visible
    assert mask.dense[..., :2].all()
    shapes = (2, 2, 8, 2), (2, 1, 10, 2), (2, 1, 10, 2)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda q, k, v: AttentionFunction.apply(q, k, v, mask), inputs)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask.dense, enable_gqa=True)
    torch.testing.assert_close(AttentionFunction.apply(*inputs, mask), expected)


@pytest.mark.parametrize(("window", "with_documents"), [(None, False), (None, True), (150, True)])
def test_mask_of_flex_attention_with_a_prefix(window: int | None, with_documents: bool) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(1)
    length = 500
    document_ids = (torch.rand(2, length) < 0.02).long().cumsum(1) if with_documents else None
    mask = CausalMask(length, document_ids, window, torch.device("cpu")).behind(20)
    query, key, value = torch.randn(2, 4, length, 16), torch.randn(2, 2, 520, 16), torch.randn(2, 2, 520, 16)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense, enable_gqa=True)
    torch.testing.assert_close(flex_attention(query, key, value, block_mask=mask.sparse, enable_gqa=True), expected)


# --- where training starts


@pytest.mark.parametrize("quantize", [None, "nf4-dq", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_an_adapter_starts_at_the_base(kind: str, dtype: torch.dtype, quantize: str | None, checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype, quantize=quantize)
    expected = model(tokens())
    assert torch.equal(inject(model, kind)(tokens()), expected)


@pytest.mark.parametrize("length", [4, 9, 20])
def test_a_prefix_of_tokens_is_these_tokens_in_front(length: int, checkpoint: Path) -> None:
    model = load_model(checkpoint, torch.float32)
    text = [7, 99, 250, 31, 5, 8, 180, 44, 12]
    front = torch.tensor([(text * 3)[:length]] * 2)
    expected = model(torch.cat((front, tokens()), dim=1))[:, length:]
    inject_prefix(model, PrefixConfig(length), text)
    assert relative_error(model(tokens()), expected) <= 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_trained_and_in_fp32(kind: str, checkpoint: Path) -> None:
    model = inject(load_model(checkpoint, torch.bfloat16), kind)
    parameters = trained(model)
    norms = {name for name in parameters if "norm" in name}
    assert len(norms) == (7 if kind == "v2" else 0)
    assert all((p.dtype == torch.float32) != (name in norms) for name, p in parameters.items())
    own = ("prefix", "adaption_prompt", "adaption_gate", "adapter_scale", "adapter_bias")
    assert parameters and all(name.endswith(own) or name in norms for name in parameters)


def test_parameter_counts() -> None:
    for config, expected in (
        # The papers' own: 1.2 M for 7B with 30 layers of 10 tokens, and 14 M
        (LlamaAdapterConfig(1), 30 * (10 * 4096 + 1)),
        (LlamaAdapterConfig(2), 30 * (10 * 4096 + 1) + 32 * (2 * (5 * 4096 + 2 * 11008) + 2 * 4096) + 4096),
    ):
        with torch.device("meta"):
            model = Llama(LlamaConfig.from_name("llama-2-7b"))
        inject_llama_adapter(model, config)
        assert sum(parameter.numel() for parameter in trained(model).values()) == expected


# --- documents of a window, rows of a batch


def packed(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """position_ids and document_ids (1, sum(lengths)) of documents that follow each other."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    documents = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
    return positions[None], documents[None]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_window_are_as_alone(kind: str, checkpoint: Path) -> None:
    model = tuned(checkpoint, kind)
    lengths = [130, 1, 40, 120]
    documents = [tokens(length, seed=length)[0] for length in lengths]
    position_ids, document_ids = packed(lengths)
    labels = torch.cat([F.pad(document[1:], (0, 1), value=-100) for document in documents])[None]

    def loss_of(ids: Tensor, labels: Tensor, *places: Tensor) -> Tensor:
        return head_loss(model.lm_head, model.model(ids, *places), labels, "sum")

    logits = model(torch.cat(documents)[None], position_ids, document_ids)[0].split(lengths)
    for document, its_logits in zip(documents, logits, strict=True):
        assert relative_error(its_logits, model(document[None])[0]) <= 2e-6
    loss = loss_of(torch.cat(documents)[None], labels, position_ids, document_ids)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trained(model).items()}
    model.zero_grad()
    alone = [
        loss_of(document[None], its_labels[None])
        for document, its_labels in zip(documents, labels[0].split(lengths), strict=True)
    ]
    sum(alone).backward()
    assert loss.item() == pytest.approx(sum(alone).item(), rel=1e-6)
    for name, parameter in trained(model).items():
        assert relative_error(gradients[name], parameter.grad) <= 1e-5, name

    documents[0], documents[2] = (319 - document for document in (documents[0], documents[2]))
    changed = model(torch.cat(documents)[None], position_ids, document_ids)[0].split(lengths)
    assert [torch.equal(*pair) for pair in zip(changed, logits, strict=True)] == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_a_batch_are_answered_as_alone(kind: str, dtype: torch.dtype, checkpoint: Path) -> None:
    model = tuned(checkpoint, kind, dtype)
    prompts = [tokens(length, seed=length)[0].tolist() for length in (40, 3, 150, 1)]
    together = generate(model, prompts, 12)
    assert together == [generate(model, prompt, 12)[0] for prompt in prompts]
    if dtype == torch.float32:
        ids = prompts[2] + together[2]
        assert model(torch.tensor([ids]))[0, 149:-1].argmax(-1).tolist() == together[2]  # without a cache
    pack_linear_layers(model)  # of use for bf16 only
    assert generate(model, prompts, 12) == together


# --- what the forward pass keeps


@pytest.mark.parametrize("kind", KINDS)
def test_activation_settings_change_nothing(kind: str, checkpoint: Path) -> None:
    def loss_and_gradients(setting: ActivationConfig | None) -> dict[str, Tensor]:
        model = tuned(checkpoint, kind).train()
        for layer in model.model.layers:
            layer.mlp.recompute_cheap = setting is not None
        if setting is not None:
            apply_activation_config(model, setting)
        ids, (position_ids, document_ids) = tokens(700), packed([300, 150, 250])
        loss = head_loss(model.lm_head, model.model(ids, position_ids, document_ids), ids.roll(-1, dims=1))
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad for name, p in trained(model).items()}}

    plain = loss_and_gradients(None)
    for setting in (
        ActivationConfig(),
        ActivationConfig(checkpoint=1),
        ActivationConfig(checkpoint=2, mlp_tiles=2),
        ActivationConfig(mlp_tiles=3),
        ActivationConfig(checkpoint=1, offload=True),
    ):
        for name, value in loss_and_gradients(setting).items():
            assert (value - plain[name]).abs().max() <= 1e-6 * max(1, plain[name].abs().max()), (setting, name)


@pytest.mark.parametrize("kind", ["prefix", "v2"])
def test_compiled_layers_learn_the_same(kind: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced as ever, and soon done

    def gradients(compiled: bool) -> dict[str, Tensor]:
        model = tuned(checkpoint, kind).train()
        apply_activation_config(model, ActivationConfig(), compile_layers=compiled)
        position_ids, document_ids = packed([20, 20])
        model(tokens(), position_ids, document_ids.expand(2, -1)).square().mean().backward()
        return {name: parameter.grad for name, parameter in trained(model).items()}

    torch._dynamo.reset()
    plain = gradients(compiled=False)
    for name, gradient in gradients(compiled=True).items():
        assert relative_error(gradient, plain[name]) <= 1e-5, name


# --- training and files


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples whose second half follows from the first by a rule; only it is a target."""
    directory, random = tmp_path_factory.mktemp("store") / "examples", np.random.default_rng(0)
    tokenizer = Tokenizer.from_checkpoint(tiny_checkpoint)
    with TokenStoreWriter(directory, tokenizer.vocab_size, tokenizer.sha256, str(tiny_checkpoint)) as writer:
        for number in range(24):
            ids = (random.integers(3, 300) + 7 * np.arange(20)) % 300 + 3
            mask = (np.arange(20) >= 10).astype(np.uint8)
            writer.add("train" if number < 16 else "val", ids, num_words=20, num_bytes=80, loss_mask=mask)
    return directory


def train_adapter(
    checkpoint_dir: Path, store: Path, out_dir: Path, kind: str, on_save: Callable[[], None] | None, resume: bool
) -> dict:
    """What finetune/adapter.py and finetune/prefix.py do, with a hook at each save."""
    arguments = TrainingArguments(
        checkpoint_dir=checkpoint_dir,
        data_dir=store,
        out_dir=out_dir,
        train=TrainConfig(max_steps=9, learning_rate=1e-2, sequence_length=32, weight_decay=0.1),
        eval=EvalConfig(interval=3),
        accelerator="cpu",
        resume=resume,
    )
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(checkpoint_dir)
    corpus = Corpus.open(arguments, tokenizer)
    model = inject(load_model(checkpoint_dir, arguments.dtype, quantize="nf4-dq"), kind)

    def save(directory: Path) -> None:
        save_prompt_tuning(model, directory)
        if on_save is not None:
            on_save()

    return train(fabric, model, tokenizer, corpus, arguments, save)


def assert_served(report: dict, checkpoint_dir: Path, store: Path, adapter_dir: Path, quantize: str | None) -> None:
    """The loss fell, and is that of the stored adapter."""
    assert report["after"]["val_loss"] < report["before"]["val_loss"]
    model = load_model(checkpoint_dir, torch.bfloat16, quantize=quantize)
    load_prompt_tuning(model, adapter_dir)
    assert sum(parameter.numel() for parameter in trained(model).values()) == report["trainable_parameters"]
    windows = TrainingWindows(TokenStore.open(store, "val"), 32, seed=0, shuffle=False)
    assert evaluate_loss(model, windows, 8).loss == report["after"]["val_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_bytes(kind: str, checkpoint: Path, store: Path, tmp_path: Path) -> None:
    whole = train_adapter(checkpoint, store, tmp_path / "whole", kind, None, resume=False)
    signals = [signal.SIGTERM]

    def stop_once() -> None:
        if signals:
            os.kill(os.getpid(), signals.pop())

    with pytest.raises(SystemExit):
        train_adapter(checkpoint, store, tmp_path / "broken", kind, stop_once, resume=False)
    assert json.loads((tmp_path / "broken/state/state.json").read_text())["step"] == 4
    torch.manual_seed(12345)  # the resumed process knows nothing of the first one's random state
    resumed = train_adapter(checkpoint, store, tmp_path / "broken", kind, None, resume=True)
    assert resumed["after"] == whole["after"]
    assert_served(resumed, checkpoint, store, tmp_path / "broken", "nf4-dq")
    for name in ("adapter_model.safetensors", "best/adapter_model.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("script", "options", "quantize"),
    [
        ("prefix", ["--prefix.init_text", "Norway's coastline is long", "--prefix.num_virtual_tokens", 8], None),
        ("adapter", ["--adapter.version", 2, "--activations.checkpoint", 1], "int8"),
    ],
    ids=["prefix", "adapter"],
)
def test_script_trains_what_is_served(
    script: str, options: list, quantize: str | None, checkpoint: Path, store: Path, tmp_path: Path
) -> None:
    run_script(
        f"finetune/{script}.py", "--checkpoint_dir", checkpoint, "--data_dir", store, "--out_dir", tmp_path,
        "--train.sequence_length", 32, "--train.max_steps", 12, "--train.warmup_steps", 2, *options,
        *(["--quantize", quantize] if quantize else []),
    )  # fmt: skip
    assert_served(json.loads((tmp_path / "report.json").read_text()), checkpoint, store, tmp_path, quantize)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_saved_again_is_the_same(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    model = tuned(checkpoint, kind)
    save_prompt_tuning(model, tmp_path, base_model="x")
    again = load_model(checkpoint, torch.float32)
    load_prompt_tuning(again, tmp_path)
    assert torch.equal(again(tokens()), model(tokens()))
    save_prompt_tuning(again, tmp_path / "again", base_model="x")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_adapters_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        save_prompt_tuning(tuned(checkpoint, kind), tmp_path / kind)
        wider = Llama(LlamaConfig(128, 3, 4, 160, 320, num_key_value_heads=2))  # no fingerprint: the shapes tell
        with pytest.raises(InputError, match=r"has shape .* another base"):
            load_prompt_tuning(wider, tmp_path / kind)
        other = load_model(checkpoint, torch.float32)
        other.fingerprint = "0" * 64
        with pytest.raises(InputError, match="trained on another base"):
            load_prompt_tuning(other, tmp_path / kind)
    for kind, change, name in (
        ("prefix", {"peft_type": "IA3"}, "peft_type"),
        ("prefix", {"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ("prefix", {"num_virtual_tokens": None}, "num_virtual_tokens"),
        ("v1", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("v1", {"target_modules": "mlp"}, "target_modules"),
        ("v1", {"adapter_layers": 4}, "adapter.layers 4 is not from 1 to 3"),
        ("v2", {"schema_version": 2}, "schema_version = 2"),
    ):
        path = tmp_path / kind / "adapter_config.json"
        stated = path.read_text()
        path.write_text(json.dumps(json.loads(stated) | change))
        with pytest.raises(InputError, match=name):
            load_prompt_tuning(load_model(checkpoint, torch.float32), tmp_path / kind)
        path.write_text(stated)


def test_options_that_cannot_be_are_named(checkpoint: Path) -> None:
    for options, message in (
        ({"num_virtual_tokens": 0}, "num_virtual_tokens 0"),
        ({"init": "zeros"}, "'zeros' is not one of tokens, random"),
    ):
        with pytest.raises(InputError, match=message):
            PrefixConfig(**options)
    for options, message in (({"version": 3}, "version 3"), ({"adapter_length": 0}, "adapter_length 0")):
        with pytest.raises(InputError, match=message):
            LlamaAdapterConfig(**options)
    model = load_model(checkpoint, torch.float32)
    with pytest.raises(InputError, match="adapter.layers 0 is not from 1 to 3"):
        inject_llama_adapter(model, LlamaAdapterConfig(layers=0))
    with pytest.raises(InputError, match="prefix.init_text"):
        inject_prefix(model, PrefixConfig())
    inject_lora(model, LoRAConfig(r=2))
    for kind in KINDS:
        with pytest.raises(InputError, match="carries an adapter already"):
            inject(model, kind)
