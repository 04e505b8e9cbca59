"""Combined adapters against PEFT's add_weighted_adapter, numpy's SVD and hand-made cases; and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import run_script
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers import LlamaForCausalLM as HuggingFaceLlama

from lit_llama.adapter_composition import (
    Combination,
    CompositionArguments,
    LowRank,
    combine,
    read_low_rank,
    write_combined_adapter,
)
from lit_llama.adapter_files import PEFT_PREFIX
from lit_llama.answering import adapter_style, adapter_system
from lit_llama.checkpoint import load_model
from lit_llama.errors import InputError
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter
from lit_llama.lora_tree import LoRATreeConfig, inject_lora_tree
from lit_llama.prompt_tuning import PrefixConfig, inject_prefix, save_prompt_tuning

SEED = 7

ALIKE = {
    "a": LoRAConfig(r=4, alpha=8),
    "b": LoRAConfig(r=4, alpha=2),
    "c": LoRAConfig(r=4, alpha=8, targets=["q_proj", "down_proj"]),
}
"""Adapters that every method combines."""

UNLIKE = {
    "patterns": LoRAConfig(r=2, alpha=4, rank_pattern={"v_proj": 5}, alpha_pattern={"layers.1.self_attn.q_proj": 9}),
    "one layer": LoRAConfig(r=3, alpha=6, targets=["o_proj", "q_proj"], layers_to_transform=[1], rslora=True),
    "head": LoRAConfig(r=6, alpha=6, targets=["lm_head", "up_proj"], layers_to_transform=[0]),
}
"""Adapters that only cat and the methods with svd combine."""


def write_adapter_of(checkpoint_dir: Path, config: LoRAConfig, adapter_dir: Path, seed: int = 0) -> Path:
    """An adapter whose update is as random as its lora_A."""
    model = load_model(checkpoint_dir, torch.float32)
    torch.manual_seed(seed)
    inject_lora(model, config)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, adapter_dir, base_model=str(checkpoint_dir))
    return adapter_dir


@pytest.fixture(scope="module")
def library(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("library")
    for seed, (name, config) in enumerate({**ALIKE, **UNLIKE}.items()):
        write_adapter_of(tiny_checkpoint, config, directory / name, seed)
    return directory


def in_peft(checkpoint_dir: Path, library: Path, names: list[str]) -> peft.PeftModel:
    base = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, library / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(library / name, adapter_name=name)
    return model


def peft_layers(model: peft.PeftModel) -> dict[str, nn.Module]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    return {name.removeprefix(PEFT_PREFIX): module for name, module in found.items()}


def tokens() -> Tensor:
    return torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(2))


def dense(updates: dict[str, LowRank]) -> dict[str, Tensor]:
    return {name: u.scaling * (u.lora_B.double() @ u.lora_A.double()) for name, u in updates.items()}


def read(library: Path, names: list[str]) -> dict[str, dict[str, LowRank]]:
    return {name: read_low_rank(library / name)[0] for name in names}


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-6) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "cat"},
        {"method": "linear"},
        {"method": "svd"},
        {"method": "svd", "rank": 3},
        {"method": "magnitude_prune", "density": 0.3},
        {"method": "magnitude_prune_svd", "density": 0.3, "rank": 5},
        {"method": "ties", "density": 0.6},
        {"method": "ties", "density": 1.0, "majority_sign": "frequency"},
        {"method": "ties_svd", "density": 0.6, "rank": 5},
        {"method": "ties_svd", "density": 0.6, "rank": 5, "majority_sign": "frequency"},
        {"method": "dare_linear", "density": 0.6},
        {"method": "dare_linear_svd", "density": 0.6, "rank": 5},
        {"method": "dare_ties", "density": 0.6, "majority_sign": "frequency"},
        {"method": "dare_ties_svd", "density": 0.6, "rank": 5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_equals_peft(options: dict[str, Any], library: Path, tiny_checkpoint: Path) -> None:
    names, weights = list(ALIKE), [0.7, -0.4, 1.5]
    model = in_peft(tiny_checkpoint, library, names)
    inject = model.base_model.inject_adapter

    def inject_and_seed(*arguments: Any) -> None:  # the initial values of the new adapter are drawn, too
        inject(*arguments)
        torch.manual_seed(SEED)

    model.base_model.inject_adapter = inject_and_seed
    model.add_weighted_adapter(
        names,
        weights,
        "combined",
        combination_type=options["method"],
        density=options.get("density"),
        svd_rank=options.get("rank"),
        majority_sign_method=options.get("majority_sign", "total"),
        svd_full_matrices=False,
    )
    combined, _ = combine(read(library, names), Combination(weights=weights, seed=SEED, **options))
    layers = peft_layers(model)
    assert combined.keys() == layers.keys()
    for name, (lora_A, lora_B, scaling) in combined.items():
        their_A, their_B = (getattr(layers[name], side)["combined"].weight for side in ("lora_A", "lora_B"))
        assert scaling == layers[name].scaling["combined"] == 1
        lowered = options["method"].endswith("svd")
        # Lowering a rank in fp32 is as inexact as its last singular values lie close together.
        assert close(lora_B @ lora_A, their_B @ their_A, 5e-5 if lowered else 2e-6)
        if not lowered:  # which leaves signs open
            rank = len(lora_A)
            assert close(lora_A, their_A[:rank]) and close(lora_B, their_B[:, :rank])
            assert not their_A[rank:].any()


@pytest.mark.parametrize("options", [{}, {"method": "svd", "rank": 100}], ids=["cat", "svd of full rank"])
def test_adapters_of_any_ranks_and_layers_add_up_here_and_in_peft(
    options: dict[str, Any], library: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    names, weights = [*UNLIKE, "a"], [0.5, -2.0, 1.0, 0.25]
    directories = [library / name for name in names]
    report = write_combined_adapter(
        CompositionArguments(adapters=directories, weights=weights, out_dir=tmp_path / "out", **options)
    )
    expected: dict[str, Tensor] = {}
    model = in_peft(tiny_checkpoint, library, names)
    for name, layer in peft_layers(model).items():
        deltas = [w * layer.get_delta_weight(key) for key, w in zip(names, weights, strict=True) if key in layer.lora_A]
        expected[name] = sum(deltas)
    ours = load_model(tiny_checkpoint, torch.float32)
    load_adapter(ours, tmp_path / "out")
    assert {name for name, layer in lora_layers(ours) if layer.delta_weight().any()} == expected.keys()
    for name, layer in lora_layers(ours):
        assert len(layer.lora_A) == report["rank"]
        if name in expected:
            assert close(layer.delta_weight(), expected[name])
    theirs = in_peft(tiny_checkpoint, tmp_path, ["out"])
    assert close(theirs(tokens()).logits, ours(tokens()))


def test_svd_is_the_best_of_its_rank_and_tells_what_it_keeps(library: Path) -> None:
    adapters = read(library, ["a", "b"])
    combined, norms = combine(adapters, Combination(method="svd", rank=3))
    updates = {name: dense(adapter) for name, adapter in adapters.items()}
    assert norms.keys() == combined.keys() == updates["a"].keys()
    for name, best in dense(combined).items():
        whole = ((updates["a"][name] + updates["b"][name]) / 2).numpy()
        values = np.linalg.svd(whole, compute_uv=False)
        assert np.linalg.matrix_rank(best.numpy(), tol=1e-6) == 3
        assert np.linalg.norm(whole - best.numpy()) == pytest.approx(np.sqrt((values[3:] ** 2).sum()), rel=1e-5)
        assert norms[name] == pytest.approx(((values[:3] ** 2).sum(), (values**2).sum()), rel=1e-5)


def test_ties_by_hand() -> None:
    """Two of four entries stay in each; signs of the sums: +, +, -, +; the mean is over those that agree."""
    name = "model.layers.0.self_attn.q_proj"
    one, other = torch.tensor([[4.0, 1.0], [-3.0, 0.5]]), torch.tensor([[2.0, 0.0], [1.0, 5.0]])
    adapters = {key: {name: LowRank(update, torch.eye(2))} for key, update in (("one", one), ("other", other))}
    combined, _ = combine(adapters, Combination(method="ties_svd", density=0.5, weights=[1.0, 3.0]))
    assert close(dense(combined)[name].float(), torch.tensor([[(4.0 + 3 * 2.0) / 2, 0.0], [-3.0, 15.0]]))


def test_arithmetic_with_weights(library: Path) -> None:
    (a, b), adapters = (dense(adapter) for adapter in read(library, ["a", "b"]).values()), read(library, ["a", "b"])
    for weights in ([1.0, -1.0], [1.0, 0.0], [0.25, 0.75]):
        for name, update in dense(combine(adapters, Combination(weights=weights))[0]).items():
            assert close(update, weights[0] * a[name] + weights[1] * b[name])
    same = {"a": adapters["a"], "again": adapters["a"]}
    nothing, norms = combine(same, Combination(method="svd", weights=[1.0, -1.0]))
    assert all(update.abs().max() < 1e-6 for update in dense(nothing).values())
    assert all(whole < 1e-10 for _, whole in norms.values())


def test_one_adapter_is_compressed_to_a_lower_rank(library: Path, tmp_path: Path) -> None:
    options = {"method": "svd", "rank": 2, "out_dir": tmp_path / "out"}
    report = write_combined_adapter(CompositionArguments(adapters=[library / "a"], **options))
    values = {n: np.linalg.svd(u.numpy(), compute_uv=False) ** 2 for n, u in dense(read(library, ["a"])["a"]).items()}
    whole = sum(squares.sum() for squares in values.values())
    assert report["energy_kept"] == pytest.approx(sum(squares[:2].sum() for squares in values.values()) / whole)
    for name, squares in values.items():
        assert report["energy_kept_by_layer"][name] == pytest.approx(squares[:2].sum() / squares.sum())


def test_an_update_of_zero_loses_nothing(library: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint, torch.float32)
    inject_lora(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path / "new")
    arguments = CompositionArguments(adapters=[tmp_path / "new"], method="svd", out_dir=tmp_path / "out")
    assert write_combined_adapter(arguments)["energy_kept"] == 1


def refused(match: str, **arguments: Any) -> None:
    """Refused in one line that matches, and nothing written."""
    out_dir = arguments["out_dir"]
    before = sorted(out_dir.rglob("*"))
    with pytest.raises(InputError, match=match) as error:
        write_combined_adapter(CompositionArguments(**arguments))
    assert "\n" not in str(error.value) and sorted(out_dir.rglob("*")) == before


def test_what_cannot_be_combined_is_refused(library: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out_dir, a = tmp_path / "out", library / "a"

    def made(name: str, config: LoRAConfig) -> Path:
        return write_adapter_of(tiny_checkpoint, config, tmp_path / name)

    def with_tensors(name: str, change: Any, fingerprint: str | None = None) -> Path:
        shutil.copytree(a, tmp_path / name)
        state = load_file(a / "adapter_model.safetensors")
        change(state)
        metadata = {"base_fingerprint": fingerprint} if fingerprint else None
        save_file(state, tmp_path / name / "adapter_model.safetensors", metadata=metadata)
        return tmp_path / name

    def with_config(name: str, **changes: Any) -> Path:
        shutil.copytree(a, tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / name

    def other_kind(name: str, inject: Any, save: Any) -> Path:
        model = load_model(tiny_checkpoint, torch.float32)
        inject(model)
        save(model, tmp_path / name)
        return tmp_path / name

    key = f"{PEFT_PREFIX}model.layers.1.mlp.up_proj.lora_A.weight"
    refused(
        r"method ties adds .* model\.layers\.0\.self_attn\.q_proj has rank 2 in .*patterns, 4 in .*a: choose cat, svd",
        adapters=[a, library / "patterns"], method="ties", density=0.5, out_dir=out_dir,
    )  # fmt: skip
    broken = {
        r"dora has DoRA": made("dora", LoRAConfig(r=4, dora=True)),
        r"whole has modules_to_save \(embed_tokens, lm_head\)": made(
            "whole", LoRAConfig(r=4, modules_to_save=["embed_tokens"])
        ),
        r"peft_type is 'LORA_TREE'": other_kind(
            "tree", lambda model: inject_lora_tree(model, LoRATreeConfig(depth=1, r=2)), save_adapter
        ),
        r"peft_type is 'PREFIX_TUNING'": other_kind(
            "prefix", lambda model: inject_prefix(model, PrefixConfig(init="random")), save_prompt_tuning
        ),
        r"other was trained on another base \(fingerprint ffffffffffff\) than .*a \(": with_tensors(
            "other", lambda state: None, "f" * 64
        ),
        r"up_proj is \(160, 32\) in .*narrow and \(160, 64\) in .*a: combine adapters": with_tensors(
            "narrow", lambda state: state.update({key: state[key][:, :32].contiguous()})
        ),
        r"up_proj holds values that are not finite": with_tensors(
            "nan", lambda state: state[key][0, 0].fill_(torch.nan)
        ),
        r"up_proj has factors \(3, 64\) and \(160, 4\)": with_tensors(
            "cut", lambda state: state.update({key: state[key][:3].contiguous()})
        ),
        r"up_proj\.lora_B\.weight is no low-rank update": with_tensors("half", lambda state: state.pop(key)),
        r"routed was trained with routed MLPs": with_config("routed", peft_type="LORA_ON_ROUTED_MLP"),
        r"pissa has PiSSA as PEFT keeps it": with_config("pissa", init_lora_weights="pissa"),
        r"_proj has factors \(4, \d+\) and \(\d+, 4\)": with_config("ranks", r=8),
        r"nowhere.*no such file": tmp_path / "nowhere",
    }
    for match, adapter in broken.items():
        refused(match, adapters=[a, adapter], out_dir=out_dir)
    refused(r"twice", adapters=[a, a], out_dir=out_dir)
    refused(r"3 weights for 2", adapters=[a, library / "b"], weights=[1, 1, 1], out_dir=out_dir)
    refused(r"holds one of the adapters", adapters=[a], out_dir=library, overwrite=True)
    refused(r"exists already", adapters=[a], out_dir=library / "b")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "ties"}, "needs density"),
        ({"method": "cat", "density": 0.5}, "leave density out"),
        ({"method": "dare_ties", "density": 0.0}, "density 0.0 is not above 0"),
        ({"method": "linear", "rank": 4}, "leave rank out"),
        ({"method": "svd", "rank": 0}, "at least 1"),
        ({"weights": [float("nan")]}, "finite"),
        ({"method": "slerp"}, "'slerp' is not one of cat"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Combination(**options)


def test_the_script(library: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(library / name, tmp_path / name)
        (tmp_path / name / "lit_config.yaml").write_text("eval: {probe_style: alpaca, probe_system: Be brief.}\n")
    arguments = ["--adapters", f"[{tmp_path / 'a'}, {tmp_path / 'b'}]", "--weights", "[1, -0.5]", "--method", "svd"]
    arguments += ["--rank", 3, "--out_dir", tmp_path / "out", "--checkpoint_dir", tiny_checkpoint]
    process = run_script("scripts/merge_adapters.py", *arguments)
    assert process.stdout.startswith(f"{tmp_path / 'out'}: rank 3 in 14 layers; kept ")
    assert adapter_style(tmp_path / "out") == "alpaca" and adapter_system(tmp_path / "out") == "Be brief."
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["arguments"]["adapters"] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert report["arguments"]["weights"] == [1, -0.5] and 0 < report["energy_kept"] < 1
    model = load_model(tiny_checkpoint, torch.float32)
    load_adapter(model, tmp_path / "out")
    base = HuggingFaceLlama.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    assert close(theirs(tokens()).logits, model(tokens()))
