"""Partitioned MLPs against formulas in float64, scipy's optimal assignment, transformers and peft.

Acceptance points of the partition that are tested elsewhere: the count of trainable parameters of the published recipe
and the classifier's indifference to padding without routing, both in test_classification.py.
"""

import json
import math
import runpy
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.classification import LabelledText, add_classification_head, example_store, label_log_probabilities
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.generation import generate
from lit_llama.lora import (
    LoRAConfig,
    adapter_parameters,
    inject_lora,
    load_adapter,
    lora_layers,
    merge_lora,
    save_adapter,
    stack_lora,
)
from lit_llama.merging import write_merged_checkpoint
from lit_llama.mlp_partition import (
    MLPPartition,
    MLPPartitionConfig,
    MLPRoutingConfig,
    PartitionedMLP,
    _assign,
    balanced_kmeans,
    mean_squared_distance,
    partition_mlp,
    partitioned_mlps,
    permute_mlp_,
    route_mlp,
)
from lit_llama.model import MLP, Llama
from lit_llama.tokenizer import Tokenizer

TOKENS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(0))


def random_mlp(hidden: int = 48, width: int = 160, dtype: torch.dtype = torch.float32, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=width, num_hidden_layers=1, num_attention_heads=1, vocab_size=1
    )
    return MLP(config).to(dtype).eval().requires_grad_(False)


def routed_mlp(top_k: int, n_experts: int = 8, dtype: torch.dtype = torch.float32) -> PartitionedMLP:
    return PartitionedMLP(random_mlp(dtype=dtype), n_experts, MLPRoutingConfig(top_k=top_k)).eval()


def weights(mlp: MLP) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        getattr(projection, "linear", projection).weight.double()
        for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )


def formula(gate: Tensor, up: Tensor, down: Tensor, x: Tensor, top_k: int, n_experts: int) -> Tensor:
    """The routed MLP token by token and expert by expert, in float64."""
    x, size = x.double(), len(gate) // n_experts
    rows = []
    for token in x:
        scores = torch.stack([(gate @ token)[e * size : (e + 1) * size].mean() for e in range(n_experts)])
        total = torch.zeros_like(token)
        for expert in scores.topk(top_k).indices.tolist():
            own = slice(expert * size, (expert + 1) * size)
            total = total + down[:, own] @ (F.silu(gate[own] @ token) * (up[own] @ token))
        rows.append(total)
    return torch.stack(rows)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def with_lora(mlp: PartitionedMLP, **options) -> PartitionedMLP:
    """Adapters on all three projections, their updates not zero."""
    model = nn.Module()
    model.config, model.mlp, model.labels = LlamaConfig.from_name("llama-7b"), mlp, None
    torch.manual_seed(3)
    targets = ["gate_proj", "up_proj", "down_proj"]
    inject_lora(model, LoRAConfig(r=4, targets=targets, **options))
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return mlp.eval()


def partitioned(checkpoint: Path, top_k: int | None = None, **options) -> Llama:
    model = load_model(checkpoint, torch.float32)
    partition_mlp(model, MLPPartitionConfig(n_experts=8, top_k=top_k, **options))
    return model


# --- clusters


def planted(size: int = 20, clusters: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around `clusters` directions, shuffled, and which direction each has."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(size * clusters) % clusters)[torch.randperm(size * clusters, generator=generator)]
    directions = F.normalize(torch.randn(clusters, 32, generator=generator), dim=1)
    rows = directions[labels] + 0.08 * torch.randn(len(labels), 32, generator=generator)
    return F.normalize(rows, dim=1), labels


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found(seed: int) -> None:
    rows, expected = planted(seed=seed)
    labels = balanced_kmeans(rows, 8, seed=seed)
    pairs = set(zip(labels.tolist(), expected.tolist(), strict=True))
    assert len(pairs) == 8  # one planted cluster for each that was found, and none split


def test_clusters_are_of_one_size_deterministic_and_tighter_than_random() -> None:
    rows = F.normalize(torch.randn(344, 24, generator=torch.Generator().manual_seed(1)), dim=1)
    labels = balanced_kmeans(rows, 8, seed=3)
    assert labels.bincount(minlength=8).tolist() == [43] * 8
    assert torch.equal(labels, balanced_kmeans(rows, 8, seed=3))
    random = torch.randperm(344, generator=torch.Generator().manual_seed(0)) % 8
    assert mean_squared_distance(rows, labels, 8) < 0.95 * mean_squared_distance(rows, random, 8)
    centroids = torch.stack([rows[labels == label].mean(0) for label in range(8)])
    by_hand = (rows - centroids[labels]).square().sum(1).mean()
    assert mean_squared_distance(rows, labels, 8) == pytest.approx(by_hand.item(), rel=1e-5)


def test_an_assignment_is_the_optimal_one() -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(5):
        cost = torch.rand(8, 96, generator=random, dtype=torch.float64).numpy()
        rows, columns = linear_sum_assignment(cost.repeat(12, axis=0))
        optimal = cost.repeat(12, axis=0)[rows, columns].sum()
        members = torch.arange(96).view(8, 12).numpy()
        _assign(cost, members)
        assert sorted(members.flatten().tolist()) == list(range(96))
        found = sum(cost[cluster, members[cluster]].sum() for cluster in range(8))
        assert found == pytest.approx(optimal, abs=1e-6)


# --- the same function


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("n_experts", [1, 8, 40])
def test_all_experts_are_the_dense_mlp(dtype: torch.dtype, bound: float, n_experts: int) -> None:
    dense = random_mlp(dtype=dtype)
    x = torch.randn(64, 48, dtype=dtype)
    expected = dense.down_proj(F.silu(dense.gate_proj(x)) * dense.up_proj(x))
    permuted = random_mlp(dtype=dtype)
    labels = balanced_kmeans(F.normalize(permuted.gate_proj.weight.float(), dim=1), n_experts)
    permute_mlp_(permuted, labels.argsort(stable=True))
    routed = PartitionedMLP(permuted, n_experts, MLPRoutingConfig(top_k=n_experts))
    assert n_experts == 1 or not torch.equal(permuted.up_proj.weight, dense.up_proj.weight)
    for path in (routed.masked, routed.grouped):
        assert relative(path(x), expected) <= bound
    assert relative(routed.decode(x[:1]), expected[:1]) <= bound


def test_a_square_mlp_is_permuted_along_the_right_axes() -> None:
    dense, permuted = random_mlp(48, 48), random_mlp(48, 48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    permute_mlp_(permuted, order)
    assert torch.equal(permuted.gate_proj.weight, dense.gate_proj.weight[order])
    assert torch.equal(permuted.up_proj.weight, dense.up_proj.weight[order])
    assert torch.equal(permuted.down_proj.weight, dense.down_proj.weight[:, order])


def test_a_partitioned_model_has_the_logits_and_the_text_of_the_dense_one(tiny_checkpoint: Path, tmp_path: Path):
    dense = load_model(tiny_checkpoint, torch.float32)
    model = partitioned(tiny_checkpoint, top_k=8)
    assert len(list(partitioned_mlps(model))) == 2
    with torch.no_grad():
        assert (model(TOKENS) - dense(TOKENS)).abs().max() <= 1e-5
    prompts = [[5, 6, 7], list(range(40, 60))]
    for path in ("masked", "blocks"):
        for mlp in partitioned_mlps(model):
            mlp.path = path
        assert generate(model, prompts, 24) == generate(dense, prompts, 24)

    plain = partitioned(tiny_checkpoint)
    save_checkpoint(plain, tmp_path / "partitioned", tokenizer_from=tiny_checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "partitioned", dtype=torch.float32).eval()
    assert (theirs(TOKENS).logits - dense(TOKENS)).abs().max() <= 1e-5
    again = load_model(tmp_path / "partitioned", torch.float32)
    assert again.mlp_partition == plain.mlp_partition and again.fingerprint != dense.fingerprint
    for number, layer in again.mlp_partition.layers.items():
        gate = dense.model.layers[number].mlp.gate_proj.weight
        assert torch.equal(again.model.layers[number].mlp.gate_proj.weight, gate[layer.permutation])


# --- scores, routing and its paths


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"init": "pissa"}, {"dora": True}])
def test_the_folded_score_is_the_mean_pre_activation(options: dict) -> None:
    plain, adapted = routed_mlp(2), with_lora(routed_mlp(2), **options)
    x = torch.randn(32, 48)
    for mlp in (plain, adapted):
        mean = mlp.gate_proj(x).unflatten(-1, (8, -1)).mean(-1)
        assert (x @ mlp.score_weight().T - mean).abs().max() <= 1e-5
    assert (adapted.score_weight() - plain.score_weight()).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_the_score_over_a_quantized_base(tiny_checkpoint: Path, tmp_path: Path, mode: str) -> None:
    save_checkpoint(partitioned(tiny_checkpoint), tmp_path / "base", tokenizer_from=tiny_checkpoint)
    model = load_model(tmp_path / "base", torch.float32, quantize=mode)
    inject_lora(model, LoRAConfig(r=4))
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    route_mlp(model, MLPRoutingConfig(top_k=2, path="blocks"))
    x = torch.randn(1, 16, 64)
    for mlp in partitioned_mlps(model):
        assert (x @ mlp.score_weight().T - mlp.gate_proj(x).unflatten(-1, (8, -1)).mean(-1)).abs().max() <= 1e-5
        with torch.no_grad():  # whose blocks cannot be read, so that it masks
            assert torch.equal(mlp(x), mlp.masked(x))


def test_the_score_follows_training() -> None:
    mlp = with_lora(routed_mlp(2)).train()
    before = mlp.score_weight()
    optimizer = torch.optim.SGD([p for p in mlp.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(8, 48)
    mlp(x).square().sum().backward()
    optimizer.step()
    mean = mlp.gate_proj(x).unflatten(-1, (8, -1)).mean(-1)
    assert (x @ mlp.score_weight().T - mean).abs().max() <= 1e-4 and not torch.allclose(mlp.score_weight(), before)
    mlp.gate_proj = mlp.gate_proj.linear.requires_grad_(True)  # the whole weight is trained
    with torch.no_grad():
        mlp.gate_proj.weight.add_(1.0)
    assert torch.allclose(mlp.score_weight(), mlp.gate_proj.weight.unflatten(0, (8, -1)).mean(1))


@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("options", [None, {}, {"init": "pissa"}])
def test_all_paths_give_what_the_formula_gives(top_k: int, options: dict | None) -> None:
    mlp = routed_mlp(top_k)
    gate, up, down = weights(mlp)
    if options is not None:
        with_lora(mlp, **options)
        gate, up, down = (p.merged_weight().double() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    x = torch.randn(100, 48)
    expected = formula(gate, up, down, x, top_k, 8)
    with torch.no_grad():
        decoded = torch.cat([mlp.decode(row[None]) for row in x])
        for output in (mlp.masked(x), mlp.grouped(x), decoded):
            assert relative(output, expected) <= 1e-5
        assert relative(mlp.masked(x), mlp.grouped(x)) <= 1e-5


def test_the_path_of_blocks_is_taken_without_a_gradient_only(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, taken = routed_mlp(2), []
    for name in ("masked", "grouped", "decode"):
        own = getattr(mlp, name)
        monkeypatch.setattr(mlp, name, lambda x, own=own, name=name: taken.append(name) or own(x))
    x = torch.randn(1, 5, 48)
    with torch.no_grad():
        mlp(x)
        mlp.path = "blocks"
        mlp(x), mlp(x[:, :1]), mlp(x[:, :1].repeat(1, 2, 1)), mlp(x[:, :2])
        mlp.train()(x)
    mlp.eval()(x)
    assert taken == ["masked", "grouped", "decode", "decode", "grouped", "masked", "masked"]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("path", ["masked", "blocks"])
def test_packed_for_generation_it_routes_alike(tiny_checkpoint: Path, adapted: bool, path: str) -> None:
    from lit_llama.packed_linear import pack_linear_layers

    model = partitioned(tiny_checkpoint, top_k=2, path=path).to(torch.bfloat16)
    if adapted:
        inject_lora(model, LoRAConfig(r=4))
        torch.manual_seed(1)
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    mlps = [layer.mlp for layer in model.model.layers]
    with torch.no_grad():
        expected = [mlp.masked(x) for mlp in mlps]
        chosen = [mlp.select(x) for mlp in mlps]
        pack_linear_layers(model)
        for mlp, output, experts in zip(mlps, expected, chosen, strict=True):
            assert torch.equal(mlp.select(x), experts)
            assert relative(mlp(x), output) <= 2e-2
            assert relative(mlp(x[:1]), output[:1]) <= 2e-2


def test_k_experts_a_token_and_no_gradient_elsewhere() -> None:
    mlp = routed_mlp(3, dtype=torch.float64).requires_grad_(True)
    x = torch.randn(6, 48, dtype=torch.float64, requires_grad=True)
    chosen = mlp.select(x)
    assert chosen.shape == (6, 3) and all(len(set(row)) == 3 for row in chosen.tolist())
    for token, experts in zip(x, chosen, strict=True):
        mlp.zero_grad()
        mlp(token[None]).square().sum().backward()
        selected = torch.zeros(8, dtype=torch.bool).index_fill_(0, experts, True).repeat_interleave(20)
        for gradient in (mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad, mlp.down_proj.weight.grad.T):
            assert (gradient[~selected] == 0).all() and (gradient[selected] != 0).any(dim=1).all()
    parameters = [p.detach().clone().requires_grad_(True) for p in mlp.parameters()]
    own = torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()])
    expected = torch.autograd.grad(formula(*parameters, x, 3, 8).square().sum(), [x, *parameters])
    for gradient, by_formula in zip(own, expected, strict=True):
        assert relative(gradient, by_formula) <= 1e-9


def test_memory_switches_leave_loss_and_gradients_as_they_are(tiny_checkpoint: Path) -> None:
    from lit_llama.activations import ActivationConfig, apply_activation_config

    results = []
    for switches in ({}, {"checkpoint": 1}, {"mlp_tiles": 2}):
        model = partitioned(tiny_checkpoint, top_k=3)
        torch.manual_seed(0)
        inject_lora(model, LoRAConfig(r=4, dropout=0.1))
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B, std=0.1)
        apply_activation_config(model.train(), ActivationConfig(**switches))
        torch.manual_seed(1)
        loss = model(TOKENS).float().square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in adapter_parameters(model).values())])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.allclose(first, second, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("where", ["train", "generate"])
def test_routing_in_one_of_training_and_generation(tiny_checkpoint: Path, where: str) -> None:
    dense, both = load_model(tiny_checkpoint, torch.float32), partitioned(tiny_checkpoint, top_k=2)
    model = partitioned(tiny_checkpoint, top_k=2, route=where)
    with torch.no_grad():
        for training in (True, False):
            routes = training == (where == "train")
            expected = both.train(training)(TOKENS) if routes else dense(TOKENS)
            assert torch.allclose(model.train(training)(TOKENS), expected, atol=1e-5)
    assert not torch.allclose(both.eval()(TOKENS), dense(TOKENS), atol=1e-3)


def test_chosen_layers_route_and_the_others_stay_whole(tiny_checkpoint: Path) -> None:
    model = partitioned(tiny_checkpoint, top_k=2, layers=[1])
    assert type(model.model.layers[0].mlp) is MLP and isinstance(model.model.layers[1].mlp, PartitionedMLP)
    assert list(model.mlp_partition.layers) == [1]


def test_true_clusters_route_better_than_random_ones() -> None:
    """A planted modular MLP: 8 modules of neurons, each of which responds to inputs of one kind."""
    _, labels = planted(seed=9)
    torch.manual_seed(0)
    kinds = torch.linalg.qr(torch.randn(48, 8)).Q.T
    mlp = random_mlp()
    mlp.gate_proj.weight.copy_(6 * kinds[labels] + 0.1 * torch.randn(160, 48))
    x = kinds.repeat_interleave(16, 0) + 0.05 * torch.randn(128, 48)
    expected = mlp(x)
    errors = {}
    for clusters in ("kmeans", "random"):
        model = Llama(
            LlamaConfig(hidden_size=48, intermediate_size=160, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
        )
        model.model.layers[0].mlp.load_state_dict(mlp.state_dict())
        partition_mlp(model, MLPPartitionConfig(n_experts=8, top_k=1, clusters=clusters))
        with torch.no_grad():
            errors[clusters] = relative(model.model.layers[0].mlp(x), expected)
    assert errors["kmeans"] < 0.2 and errors["random"] > 0.6


def test_a_routed_classifier_does_not_see_padding(tiny_checkpoint: Path) -> None:
    model = partitioned(tiny_checkpoint, top_k=2)
    torch.manual_seed(0)
    add_classification_head(model, ["a", "b"])
    rows = [LabelledText("Oslo is the capital of Norway. " * count, "a") for count in (1, 5, 2, 7)]
    store = example_store(rows, [0] * 4, Tokenizer.from_checkpoint(tiny_checkpoint), 256, "rows")
    alone = label_log_probabilities(model, store, batch_size=1)
    assert (label_log_probabilities(model, store, batch_size=4) - alone).abs().max() <= 1e-5


# --- what is trained is what is served


@pytest.fixture(scope="module")
def workplace(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An instruction store, and what scripts/partition_mlp.py made of the tiny checkpoint and printed."""
    directory = tmp_path_factory.mktemp("partition")
    rows = [{"instruction": f"Name the capital of country {i}.", "output": f"It is Oslo {i}."} for i in range(8)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_script(
        "scripts/prepare_instructions.py", "--source", directory / "rows.jsonl", "--checkpoint_dir", tiny_checkpoint,
        "--data_dir", directory / "store", "--style", "alpaca", "--val_fraction", 0.25,
    )  # fmt: skip
    printed = run_script(
        "scripts/partition_mlp.py", "--checkpoint_dir", tiny_checkpoint, "--out_dir", directory / "base", "--n_experts",
        8, "--data_dir", directory / "store", "--sequence_length", 240, "--top_k", "[8, 2]",
    )  # fmt: skip
    (directory / "printed.json").write_text(printed.stdout)
    return directory


def test_the_script_reports_and_leaves_an_ordinary_checkpoint(workplace: Path, tiny_checkpoint: Path) -> None:
    result = json.loads((workplace / "printed.json").read_text())
    assert result["neurons_per_expert"] == [20] and result["reordering_error"] <= 1e-6
    assert result["distance"] < result["random_distance"]
    assert result["top_k"]["8"]["loss"] == pytest.approx(result["dense"]["loss"], abs=1e-5)
    assert abs(result["top_k"]["2"]["loss"] - result["dense"]["loss"]) > 1e-3
    assert result["top_k"]["2"]["least_used_expert"] < 0.25 < result["top_k"]["2"]["most_used_expert"] <= 1
    base = workplace / "base"
    assert (base / "config.json").read_bytes() == (tiny_checkpoint / "config.json").read_bytes()
    stored = json.loads((base / "mlp_partition.json").read_text())
    labels, permutation = (torch.tensor(stored["layers"]["1"][name]) for name in ("labels", "permutation"))
    assert torch.equal(labels[permutation], torch.arange(8).repeat_interleave(20))


def test_a_routed_run_is_evaluated_with_the_loss_it_reported(workplace: Path, tmp_path: Path) -> None:
    base, out = workplace / "base", tmp_path / "out"
    run_script(
        "finetune/lora.py", "--checkpoint_dir", base, "--data_dir", workplace / "store", "--out_dir", out,
        "--partition.top_k", 2, "--partition.layers", "[1]", "--train.sequence_length", 240, "--train.max_steps", 4,
        "--train.learning_rate", 1e-2, "--eval.interval", 2, "--precision", "fp32",
    )  # fmt: skip
    reported = json.loads((out / "report.json").read_text())["after"]["val_loss"]
    process = run_script(
        "scripts/evaluate.py", "--checkpoint_dir", base, "--adapter_dir", out, "--data_dirs",
        f"{{own: {workplace / 'store'}}}", "--sequence_length", 240, "--dtype", "fp32",
    )  # fmt: skip
    assert json.loads(process.stdout)["perplexity"]["own"]["loss"] == pytest.approx(reported, rel=1e-6)
    stated = json.loads((out / "adapter_config.json").read_text())
    assert stated["mlp_routing"] == {"top_k": 2, "layers": [1], "route": "both", "path": "masked"}

    question = ("--prompt", "Oslo", "--max_new_tokens", 4, "--dtype", "bf16")
    run_script("generate/lora.py", "--checkpoint_dir", base, "--adapter_dir", out, *question)
    with pytest.raises((KeyError, ValueError), match="LORA_ON_ROUTED_MLP"):  # rather than leave the routing out
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    with pytest.raises(InputError, match="which a merged checkpoint would not route"):
        write_merged_checkpoint(base, out, tmp_path / "merged")
    model = load_model(base, torch.float32)
    stack_lora(model, LoRAConfig(r=2), out)
    assert model.mlp_routing == MLPRoutingConfig(top_k=2, layers=[1])
    with pytest.raises(InputError, match="routes already by {'top_k': 2.*it cannot also route by {'top_k': 4"):
        route_mlp(model, MLPRoutingConfig(top_k=4))


def test_a_routed_classifier_is_served_as_it_was_trained(workplace: Path, tmp_path: Path) -> None:
    rows = [f"{i}\tOslo is city {i}.\tNorway {i}.\t{'yes' if i % 3 else 'no'}" for i in range(12)]
    (tmp_path / "rows.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    base, out, file = workplace / "base", tmp_path / "out", tmp_path / "rows.tsv"
    run_script(
        "finetune/classify.py", "--checkpoint_dir", base, "--train_file", file, "--val_file", file, "--out_dir", out,
        "--train.global_batch_size", 4, "--train.micro_batch_size", 4, "--train.epochs", 2, "--train.learning_rate",
        1e-2, "--precision", "fp32", "--partition.top_k", 1,
    )  # fmt: skip
    served = ("--checkpoint_dir", base, "--adapter_dir", out, "--file", file, "--dtype", "fp32")
    answers = [json.loads(line) for line in run_script("generate/classify.py", *served).stdout.splitlines()]
    after = json.loads((out / "report.json").read_text())["after"]
    right = [answer["label"] == answer["expected"] for answer in answers]
    assert sum(right) / 12 == pytest.approx(after["val_accuracy"])
    # With two labels the probability of the expected one is that of the answer, or the rest of it.
    losses = [
        -math.log(answer["probability"] if ok else 1 - answer["probability"])
        for ok, answer in zip(right, answers, strict=True)
    ]
    assert sum(losses) / 12 == pytest.approx(after["val_loss"], rel=1e-4)


# --- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 7}, r"n_experts 7 does not divide the MLP's width of 160; these do: \[2, 4, 5, 8, 10, 16, 20\]"),
        ({"n_experts": 0}, "n_experts 0 does not divide"),
        ({"n_experts": 8, "top_k": 9}, "top_k 9 is not from 1 to 8"),
        ({"n_experts": 8, "top_k": 0}, "top_k 0 is not from 1 to 8"),
        ({"n_experts": 8, "layers": [0, 2]}, r"there is no layer 2 .*: the model has \[0, 1\]"),
        ({"n_experts": 8, "layers": []}, "the list of layers to partition or route is empty"),
        ({"clusters": "spectral"}, "clusters 'spectral' is not one of kmeans, random"),
        ({"route": "always"}, "partition.route 'always' is not one of both, train, generate"),
    ],
)
def test_bad_settings_are_named(tiny_checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        partition_mlp(load_model(tiny_checkpoint), MLPPartitionConfig(**options))


def test_what_cannot_be_partitioned_or_routed_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    eight = MLPPartitionConfig(n_experts=8)
    with pytest.raises(InputError, match="layer 0: gate_proj is quantized"):
        partition_mlp(load_model(tiny_checkpoint, quantize="int8"), eight)
    adapted = load_model(tiny_checkpoint)
    inject_lora(adapted, LoRAConfig(r=2))
    with pytest.raises(InputError, match="carries an adapter: merge it first"):
        partition_mlp(adapted, eight)
    with pytest.raises(InputError, match="the checkpoint is not partitioned"):
        route_mlp(adapted, MLPRoutingConfig(top_k=2))
    model = partitioned(tiny_checkpoint, layers=[1])
    with pytest.raises(InputError, match="the model is partitioned already"):
        partition_mlp(model, eight)
    with pytest.raises(InputError, match=r"there is no layer 0 .*: the checkpoint is partitioned in \[1\]"):
        route_mlp(model, MLPRoutingConfig(top_k=2, layers=[0]))
    with pytest.raises(InputError, match="top_k 9 is not from 1 to 8"):
        route_mlp(model, MLPRoutingConfig(top_k=9))

    route_mlp(model, MLPRoutingConfig(top_k=2))
    inject_lora(model, LoRAConfig(r=2))
    with pytest.raises(InputError, match="trained with routed MLPs"):
        merge_lora(model)
    save_adapter(model, tmp_path / "adapter")
    stated = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for change, message in (
        ({"schema_version": 2}, "schema_version 2 is not 1"),
        ({"mlp_routing": {"k": 2}}, "mlp_routing is not what a run with --partition writes"),
        ({"mlp_routing": {"top_k": 2, "layers": [0]}}, r"adapter_config.json: there is no layer 0"),
    ):
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(stated | change))
        with pytest.raises(InputError, match=message):
            load_adapter(partitioned(tiny_checkpoint, layers=[1]), tmp_path / "adapter")

    (tmp_path / "mlp_partition.json").write_text('{"schema_version": 1, "layers": []}')
    with pytest.raises(InputError, match="mlp_partition.json: not what scripts/partition_mlp.py writes"):
        MLPPartition.load(tmp_path)
    (tmp_path / "mlp_partition.json").write_text('{"schema_version": 9}')
    with pytest.raises(InputError, match="expected schema_version 1"):
        MLPPartition.load(tmp_path)


def test_the_scripts_refuse_in_one_line(workplace: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "scripts/partition_mlp.py"))["main"]
    for checkpoint, options, message in (
        (workplace / "base", {}, "the model is partitioned already: start from the dense checkpoint"),
        (tiny_checkpoint, {"top_k": [4]}, "--top_k needs --data_dir, the text to score"),
        (tiny_checkpoint, {"data_dir": workplace / "store", "top_k": [9]}, "--top_k 9 is not from 1 to 8"),
    ):
        with pytest.raises(InputError, match=message):
            main(checkpoint_dir=checkpoint, out_dir=tmp_path / "out", n_experts=8, **options)
    process = run_script(
        "finetune/lora.py", "--checkpoint_dir", tiny_checkpoint, "--data_dir", workplace / "store", "--out_dir",
        tmp_path / "out", "--partition.top_k", 2, check=False,
    )  # fmt: skip
    message = "error: the checkpoint is not partitioned: make a partitioned one with scripts/partition_mlp.py"
    assert process.returncode == 2 and process.stderr.splitlines()[-1] == message
    assert not (tmp_path / "out").exists()
