"""A tree of LoRA adapters against its formulas, plain LoRA and itself: routed softly, hard, alone, cached and saved."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_llama.activations import ActivationConfig, apply_activation_config
from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.generation import generate
from lit_llama.kv_cache import KVCache
from lit_llama.lora import LoRAConfig, inject_lora, learning_rate_factors, load_adapter, lora_layers, save_adapter
from lit_llama.lora_linear import LoRALinearFunction
from lit_llama.lora_tree import (
    LoRATreeConfig,
    inject_lora_tree,
    merge_leaves_of,
    mutual_information,
    router_logits,
    soft_routing,
    tree_layers,
)
from lit_llama.lora_tree_linear import LoRATreeFunction, LoRATreeLinear, add_leaf_update_, cheapest_kernel
from lit_llama.lora_tree_routing import (
    Leaves,
    LoRATree,
    Router,
    RouterLogitsFunction,
    decision_entropy,
    descend,
    leaf_weights,
    top_k_weights,
    tree_balance,
)
from lit_llama.model import Llama
from lit_llama.optimizer import Optimizer
from lit_llama.packed_linear import PackedLinear, pack_linear_layers
from lit_llama.training_step import LossOfBatch

SCOPES = ("block", "linear", "model")
KINDS = {
    **{scope: LoRATreeConfig(depth=2, r=3, scope=scope) for scope in SCOPES},
    "sequence": LoRATreeConfig(depth=2, r=3, route_by="sequence", prompt_tokens=8),
    "sequence, model": LoRATreeConfig(depth=2, r=3, scope="model", route_by="sequence", prompt_tokens=8),
    "softmax": LoRATreeConfig(depth=2, r=3, router="softmax"),
    "frozen": LoRATreeConfig(depth=2, r=3, router="frozen", scope="model"),
}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 2 layers whose attention is not uniform."""
    directory = tmp_path_factory.mktemp("checkpoint") / "lively"
    torch.manual_seed(0)
    config = LlamaConfig(64, 2, 4, 160, 320, num_key_value_heads=2, max_position_embeddings=1024)
    model = Llama(config)
    model.initialize_(std=0.12)
    save_checkpoint(model, directory, tokenizer_from=tiny_checkpoint)
    return directory


def planted(checkpoint_dir: Path, config: LoRATreeConfig, quantize: str | None = None, **options: object) -> Llama:
    """A model with a tree whose leaves differ; in eval mode."""
    model = load_model(checkpoint_dir, options.get("dtype", torch.float32), quantize=quantize)
    torch.manual_seed(1)
    inject_lora_tree(model, config)
    for _, layer in tree_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    for router in model.lora_tree.routers.values():
        if getattr(router, "weight", None) is not None:
            router.weight.detach().mul_(4)
    return model


def tokens(length: int = 40, batch: int = 2, seed: int = 2) -> Tensor:
    return torch.randint(3, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


def leaves_taken(model: Llama, ids: Tensor) -> Tensor:
    """(routers, batch, length)."""
    return torch.stack([descend(logits) for logits in router_logits(model, ids).values()])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# --- products


def leaf_update(x: Tensor, A: Tensor, B: Tensor, leaves: Leaves, kernel: str | None = None) -> Tensor:
    return add_leaf_update_(torch.zeros(len(x), len(B)), x, A, B, leaves, 1.0, kernel)


def factors(leaves: int, r: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(leaves * r, 24, dtype=dtype), torch.randn(40, leaves * r, dtype=dtype)


@pytest.mark.parametrize("rows", [1, 37])
def test_three_kernels_give_what_the_leaf_gives(rows: int) -> None:  # (d)
    A, B = factors(8, 3)
    x, index = torch.randn(rows, 24), torch.randint(0, 8, (rows,))
    expected = torch.stack(
        [
            B.double()[:, 3 * leaf : 3 * leaf + 3] @ (A.double()[3 * leaf : 3 * leaf + 3] @ row)
            for row, leaf in zip(x.double(), index.tolist(), strict=True)
        ]
    )
    for kernel in ("mask", "gather", "segment"):
        assert relative_error(leaf_update(x, A, B, Leaves(index, 8), kernel), expected) <= 1e-6, kernel


def test_the_kernel_is_chosen_by_what_it_moves() -> None:
    assert cheapest_kernel(1, 16, 16 * 8) == cheapest_kernel(2048, 16, 16 * 8) == "mask"
    assert cheapest_kernel(1, 32, 32 * 16) == "gather"
    assert cheapest_kernel(64, 32, 32 * 16) == cheapest_kernel(2048, 32, 32 * 16) == "segment"


def test_soft_is_hard_where_decisions_are_certain() -> None:  # (c)
    A, B = factors(8, 3)
    x = torch.randn(60, 24)
    logits = torch.randn(60, 7)
    logits = logits + 30 * logits.sign()
    soft = LoRATreeFunction.apply(x, A, B, leaf_weights(logits), 1.5, 0.0, nn.Linear(24, 40, bias=False), 0)
    torch.manual_seed(0)
    base = nn.Linear(24, 40, bias=False)
    soft = LoRATreeFunction.apply(x, A, B, leaf_weights(logits), 1.5, 0.0, base, 0)
    for kernel in ("mask", "gather", "segment"):
        hard = base(x) + 1.5 * leaf_update(x, A, B, Leaves(descend(logits), 8), kernel)
        assert relative_error(soft, hard) <= 1e-5


@pytest.mark.parametrize("node", [0, 2])
def test_swapping_children_changes_nothing(node: int) -> None:  # (e)
    A, B = factors(8, 3)
    x, W, b = torch.randn(30, 24), torch.randn(7, 24), torch.randn(7)
    below = {0: [(1, 2), (3, 5), (4, 6)], 2: [(5, 6)]}[node]
    leaves = {0: [4, 5, 6, 7, 0, 1, 2, 3], 2: [0, 1, 2, 3, 6, 7, 4, 5]}[node]
    order = list(range(7))
    for left, right in below:
        order[left], order[right] = right, left
    sign = torch.ones(7)
    sign[node] = -1
    swapped_W, swapped_b = (sign[:, None] * W)[order], (sign * b)[order]
    swapped_A = A.view(8, 3, 24)[leaves].flatten(0, 1)
    swapped_B = B.view(40, 8, 3)[:, leaves].flatten(1)
    z, swapped_z = F.linear(x, W, b), F.linear(x, swapped_W, swapped_b)
    base = nn.Linear(24, 40, bias=False)
    args = (2.0, 0.0, base, 0)
    soft = LoRATreeFunction.apply(x, A, B, leaf_weights(z), *args)
    assert relative_error(LoRATreeFunction.apply(x, swapped_A, swapped_B, leaf_weights(swapped_z), *args), soft) <= 1e-6
    hard = leaf_update(x, A, B, Leaves(descend(z), 8))
    assert relative_error(leaf_update(x, swapped_A, swapped_B, Leaves(descend(swapped_z), 8)), hard) <= 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients(dropout: float) -> None:  # (g)
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=False).double().requires_grad_(False)

    def double(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, A: Tensor, B: Tensor, W: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(3)  # the mask of dropout is the same in all calls
        weights = leaf_weights(RouterLogitsFunction.apply(x, W, b))
        return LoRATreeFunction.apply(x, A, B, weights, 0.7, dropout, base, 0)

    inputs = (double(4, 6), double(4 * 2, 6), double(5, 4 * 2), double(3, 6), double(3))
    assert torch.autograd.gradcheck(product, inputs)
    if dropout:
        return
    x, A, B, W, b = inputs
    weights = leaf_weights(F.linear(F.rms_norm(x, (6,), eps=0.0), W, b))
    plain = F.linear(x, base.weight) + 0.7 * (F.linear(x, A) * weights.repeat_interleave(2, 1)) @ B.T
    torch.testing.assert_close(product(*inputs), plain)
    assert torch.autograd.gradcheck(lambda z: top_k_weights(z, 2), double(5, 4))
    assert torch.autograd.gradcheck(lambda z: tree_balance(z, torch.tensor([1.0, 0, 1, 1, 1]).double()), double(5, 7))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_leaf_is_plain_lora_bit_for_bit_in_the_general_product(dropout: float) -> None:  # (a), the general path
    torch.manual_seed(0)
    base = nn.Linear(24, 40, bias=False).requires_grad_(False)
    results = []
    for function, weights in ((LoRALinearFunction, (None,)), (LoRATreeFunction, (torch.ones(50, 1),))):
        A, B = (tensor.requires_grad_() for tensor in factors(1, 8))
        x = torch.randn(50, 24, generator=torch.Generator().manual_seed(5)).requires_grad_()
        torch.manual_seed(7)
        y = function.apply(x, A, B, *weights, 2.0, dropout, base, 0)
        y.backward(torch.randn(50, 40, generator=torch.Generator().manual_seed(6)))
        results.append((y, x.grad, A.grad, B.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_depth_zero_is_plain_lora_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:  # (a)
    models = []
    for kind in ("lora", "tree"):
        model = load_model(checkpoint, torch.float32)
        torch.manual_seed(3)
        if kind == "lora":
            inject_lora(model, LoRAConfig(r=4, alpha=8, dropout=0.1))
        else:
            inject_lora_tree(model, LoRATreeConfig(depth=0, r=4, alpha=8, dropout=0.1))
        optimizer = Optimizer(model, 0.1, (0.9, 0.95), "adamw", learning_rate_factors(model))
        for _ in range(2):
            F.cross_entropy(model.train()(tokens()).flatten(0, 1), tokens(seed=9).flatten()).backward()
            optimizer.step(1e-2)
        save_adapter(model, tmp_path / kind)
        models.append(model.eval())
    one, other = models
    assert torch.equal(one(tokens()), other(tokens()))
    name = "adapter_model.safetensors"
    assert (tmp_path / "lora" / name).read_bytes() == (tmp_path / "tree" / name).read_bytes()


def test_leaves_begin_as_wide_as_a_plain_adapter_and_a_tree_at_its_base(checkpoint: Path) -> None:
    model = load_model(checkpoint, torch.float32)
    expected = model(tokens())
    inject_lora_tree(model, LoRATreeConfig(depth=3, r=4))
    assert torch.equal(model(tokens()), expected)
    assert torch.equal(model.train()(tokens()), expected)
    for name, layer in tree_layers(model):
        bound = 1 / math.sqrt(layer.in_features)  # Kaiming with a = sqrt(5), by the inputs of one leaf
        assert 0.9 * bound < layer.lora_A.abs().max() <= bound, name


# --- the model


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_different_leaves_are_what_each_is_alone(kind: str, checkpoint: Path) -> None:  # (k)
    model, ids = planted(checkpoint, KINDS[kind]), tokens(batch=4)
    together = model(ids)
    if kind != "softmax":
        taken = leaves_taken(model, ids)
        assert any(len(router.unique()) > 1 for router in taken)
        assert (taken[:, 0] != taken[:, 1]).any()
    for row in range(4):
        assert relative_error(together[row], model(ids[row : row + 1])[0]) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_routed_by_what_follows(kind: str, checkpoint: Path) -> None:
    model, ids = planted(checkpoint, KINDS[kind]).train(), tokens()
    changed = ids.clone()
    changed[:, 25:] = tokens(seed=8)[:, 25:]
    for mode in (True, False):
        model.train(mode)
        one, other = model(ids), model(changed)
        assert torch.equal(one[:, :25], other[:, :25]) and not torch.equal(one[:, 25:], other[:, 25:])


@pytest.mark.parametrize("kind", ["block", "sequence", "sequence, model"])
def test_a_document_in_a_window_is_what_it_is_alone(kind: str, checkpoint: Path) -> None:
    model, ids = planted(checkpoint, KINDS[kind]), tokens(30, 1)
    documents = torch.tensor([[0] * 12 + [1] * 18])
    positions = torch.cat((torch.arange(12), torch.arange(18)))[None]
    packed = model(ids, positions, documents)
    assert relative_error(packed[:, :12], model(ids[:, :12])) <= 1e-5
    assert relative_error(packed[:, 12:], model(ids[:, 12:])) <= 1e-5


@pytest.mark.parametrize("kind", ["block", "linear", "model", "sequence", "softmax"])
def test_cached_generation_is_the_full_forward(kind: str, checkpoint: Path) -> None:  # (i)
    model, ids = planted(checkpoint, KINDS[kind]), tokens(30)
    full = model(ids)
    cache = KVCache(model.config, 2, 30, torch.float32)
    parts = [model(ids[:, :7], cache=cache), model(ids[:, 7:12], cache=cache)]  # prompts come in chunks
    parts += [model(ids[:, i : i + 1], cache=cache) for i in range(12, 30)]
    assert relative_error(torch.cat(parts, dim=1), full) <= 1e-4


@pytest.mark.parametrize("kind", ["sequence", "sequence, model"])
def test_a_prompts_leaf_is_kept_through_decoding(kind: str, checkpoint: Path) -> None:  # (i)
    model = planted(checkpoint, KINDS[kind])
    prompts = [tokens(length, 1, seed=length)[0].tolist() for length in (3, 5, 20)]
    seen: list[Tensor] = []

    def note(*_: object) -> None:
        seen.append(torch.stack([r.routing.index.view(-1, 1) for r in model.lora_tree.routers.values()]))

    together = generate(model, prompts, 12)
    for prompt, answer in zip(prompts, together, strict=True):
        with torch.no_grad():
            at_the_end = leaves_taken(model, torch.tensor([prompt]))[:, 0, -1]
        seen.clear()
        handle = model.model.register_forward_hook(note)
        assert generate(model, prompt, 12) == [answer]
        handle.remove()
        assert len(seen) == 12 and all((step[:, 0, 0] == at_the_end).all() for step in seen[1:])
        assert model.lora_tree._documents_and_cache == (None, None)  # or the cache would stay in memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_saved_and_loaded_with_its_routers(kind: str, quantize: str | None, checkpoint: Path, tmp_path: Path) -> None:
    model = planted(checkpoint, KINDS[kind], quantize)  # (j)
    expected = model(tokens())
    save_adapter(model, tmp_path)
    again = load_model(checkpoint, torch.float32, quantize=quantize)
    load_adapter(again, tmp_path)
    assert torch.equal(again.eval()(tokens()), expected)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(name.endswith("lora_router.weight") for name in stored) == len(model.lora_tree.routers)
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    save_adapter(again, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA_TREE"


def batch(ids: Tensor) -> tuple[Tensor, ...]:
    rows, length = ids.shape
    targets = torch.arange(rows * length)
    positions = torch.arange(length).expand(rows, -1)
    nothing = torch.zeros(len(targets), 0)
    return ids, ids.roll(-1, 1), positions, torch.zeros_like(ids), targets, nothing.long(), nothing


def trained(model: Llama) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", ["block", "linear", "model", "sequence", "softmax"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_routers_learn_once_the_leaves_differ(kind: str, quantize: str | None, checkpoint: Path) -> None:  # (f)
    model = load_model(checkpoint, torch.float32, quantize=quantize)
    torch.manual_seed(1)
    inject_lora_tree(model, KINDS[kind])
    model.train().auxiliary.start_step(0.0)
    model.lora_tree.config.balance_weight = 0.0
    optimizer = Optimizer(model, 0.0, (0.9, 0.95), "adamw", learning_rate_factors(model))
    parameters = trained(model)
    assert all(parameter.dtype == torch.float32 and ".lora_" in name for name, parameter in parameters.items())
    for step in range(3):
        LossOfBatch(model)(*batch(tokens())).backward()
        routers = [p.grad for name, p in parameters.items() if ".lora_router." in name]
        A = [p.grad for name, p in parameters.items() if name.endswith("lora_A")]
        if step == 0:
            assert all((grad == 0).all() for grad in (*routers, *A))
        elif step == 2:
            assert all((grad != 0).any() for grad in (*routers, *A))
        optimizer.step(1e-2)


@pytest.mark.parametrize("kind", ["block", "linear", "model", "sequence"])
@pytest.mark.parametrize("switches", [{"checkpoint": 1}, {"mlp_tiles": 2}, {"checkpoint": 1, "mlp_tiles": 2}], ids=str)
def test_saving_activations_changes_no_gradient(kind: str, switches: dict, checkpoint: Path) -> None:
    model, ids = planted(checkpoint, KINDS[kind]).train(), tokens(320)  # more than one piece of 256 rows
    model.lora_tree.entropy_weight = 0.5
    results = []
    for config in (ActivationConfig(), ActivationConfig(**switches)):
        apply_activation_config(model, config)
        loss = LossOfBatch(model)(*batch(ids))
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in trained(model).items()}))
        model.zero_grad(set_to_none=True)
    (loss, gradients), (other, others) = results
    torch.testing.assert_close(loss, other)
    for name, gradient in gradients.items():
        assert relative_error(others[name], gradient) <= 1e-4, name


def test_the_penalty_reaches_gradients_and_not_the_loss(checkpoint: Path) -> None:
    model = planted(checkpoint, KINDS["block"]).train()
    tree, ids = model.lora_tree, tokens()
    bias = model.model.layers[0].mlp.lora_router.bias
    results = []
    for weight in (0.0, 2.0):
        tree.entropy_weight, tree.config.balance_weight = weight, weight
        loss = LossOfBatch(model)(*batch(ids))
        loss.backward()
        results.append((loss.detach(), bias.grad))
        model.zero_grad(set_to_none=True)
    assert torch.equal(results[0][0], results[1][0])
    penalty = torch.zeros(())
    model.model(ids)
    for router in tree.routers.values():
        (z,) = router.logits
        penalty = penalty + 2 * decision_entropy(z).mean() + 2 * tree_balance(z, torch.ones(len(z)))
    (penalty * ids.numel() / len(tree.routers)).backward()
    torch.testing.assert_close(results[1][1] - results[0][1], bias.grad, rtol=1e-3, atol=1e-5)


def test_padding_weighs_nothing_in_the_penalty(checkpoint: Path) -> None:
    model = planted(checkpoint, KINDS["block"]).train()
    model.lora_tree.entropy_weight, penalties = 1.0, []
    ids = tokens(30, 1)
    for padding in (0, 10):
        documents = torch.tensor([[0] * 30 + [-1] * padding])
        positions = torch.cat((torch.arange(30), torch.zeros(padding, dtype=torch.int64)))[None]
        model.model(F.pad(ids, (0, padding)), positions, documents)
        penalties.append(model.auxiliary.loss())
    torch.testing.assert_close(*penalties)


def test_schedule_and_the_frozen_routers_of_its_end(checkpoint: Path) -> None:
    model = load_model(checkpoint, torch.float32)
    config = LoRATreeConfig(depth=2, r=2, entropy_weight=2.0, entropy_warmup=0.2, train_hardened=0.2)
    inject_lora_tree(model, config)
    tree = model.train().auxiliary
    expected = {0.0: 0, 0.2: 0, 0.5: 1, 0.8: 2, 0.99: 2}
    for done, weight in expected.items():
        tree.start_step(done)
        assert tree.entropy_weight == pytest.approx(weight) and tree.hardened == (done >= 0.8)

    optimizer = Optimizer(model, 0.0, (0.9, 0.95), "adamw")
    snapshots = []
    for done in (0.5, 0.6, 0.7, 0.8, 0.9):
        tree.start_step(done)
        LossOfBatch(model)(*batch(tokens())).backward()
        assert all(parameter.grad is not None for parameter in trained(model).values())  # wrappers wait for them
        tree.before_update()
        optimizer.step(1e-2)
        snapshots.append({name: p.detach().clone() for name, p in trained(model).items()})
    for name in snapshots[0]:
        moved = [not torch.equal(one[name], other[name]) for one, other in itertools.pairwise(snapshots)]
        assert moved == [True, True, *([".lora_router." not in name] * 2)], name


def test_hardened_training_computes_what_evaluation_does(checkpoint: Path) -> None:
    model = planted(checkpoint, LoRATreeConfig(depth=2, r=3, train_hardened=0.5))
    hard = model(tokens())
    model.train().auxiliary.start_step(0.9)
    assert relative_error(model(tokens()), hard) <= 1e-5
    model.auxiliary.start_step(0.1)
    soft = model(tokens())
    assert relative_error(soft, hard) > 1e-2
    with soft_routing(model.eval()):
        assert relative_error(model(tokens()), soft) <= 1e-5


def test_region_leak_swaps_children_in_training_only(checkpoint: Path) -> None:
    model = planted(checkpoint, LoRATreeConfig(depth=1, r=2, region_leak=0.5, scope="model")).train()
    router = model.lora_tree.routers["model"]
    x = torch.randn(4000, 64)
    router(x)
    z = F.linear(F.rms_norm(x, (64,)), router.weight, router.bias)
    swapped = (router.routing[:, 1] - torch.sigmoid(z)[:, 0]).abs() > 1e-6
    assert abs(swapped.float().mean() - 0.5) < 5 * 0.5 / math.sqrt(4000)
    torch.testing.assert_close(router.routing[swapped][:, 0], torch.sigmoid(z)[swapped][:, 0])
    router.eval()(x)
    assert torch.equal(router.routing.index, descend(z))


def test_routers_decide_in_fp32_under_bf16(checkpoint: Path) -> None:
    model = planted(checkpoint, KINDS["block"], dtype=torch.bfloat16)
    inputs: list[Tensor] = []
    block = model.model.layers[0].mlp
    block.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    model(tokens())
    router = block.lora_router
    assert inputs[0].dtype == torch.bfloat16 and router.weight.dtype == torch.float32
    x = F.rms_norm(inputs[0].double().flatten(0, 1), (64,))
    expected = descend(F.linear(x, router.weight.double(), router.bias.double()))
    assert torch.equal(router.routing.index, expected)


def test_a_tree_learns_domains_that_one_adapter_of_its_size_cannot() -> None:  # (h)
    torch.manual_seed(0)
    domains = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    maps = torch.randn(4, 12, 12) / 12**0.5

    def data(count: int) -> tuple[Tensor, Tensor, Tensor]:
        which = torch.randint(0, 4, (count,))
        content = torch.randn(count, 12)
        return torch.cat((2 * domains[which], content), dim=1), torch.einsum("noi,ni->no", maps[which], content), which

    def train(layer: nn.Module, tree: LoRATree | None) -> nn.Module:
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
        for step in range(400):
            x, y, _ = data(128)
            if tree is not None:
                tree.start_step(step / 400)
                tree.collecting = not tree.hardened
            loss = F.mse_loss(layer(x), y)
            (loss + (tree.loss() if tree is not None else 0)).backward()
            if tree is not None:
                tree.before_update()
            optimizer.step()
            optimizer.zero_grad()
        return layer.eval()

    base = nn.Linear(14, 12, bias=False).requires_grad_(False)
    tree = LoRATree(LoRATreeConfig(depth=2, r=12, entropy_weight=0.3))
    tree.routers["own"] = router = Router(tree, 14, torch.device("cpu"))
    planted_tree = train(LoRATreeLinear(base, 4, 12, 1.0, 0.0, router, owned=True), tree)
    adapted = nn.Sequential(nn.Linear(14, 48, bias=False), nn.Linear(48, 12, bias=False))
    nn.init.zeros_(adapted[1].weight)

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.update = base, adapted

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.update(x)

    plain = train(Adapted(), None)
    x, y, which = data(4000)
    with torch.no_grad():
        tree_loss, plain_loss = F.mse_loss(planted_tree(x), y), F.mse_loss(plain(x), y)
    taken = router.routing.index
    assert tree_loss < 0.1 * plain_loss
    shares = torch.bincount(taken, minlength=4) / len(taken)
    assert (shares > 0.05).all()
    counts = torch.stack([torch.bincount(taken[which == d], minlength=4) for d in range(4)])[:, None]
    assert mutual_information(counts) > 0.9 * math.log(4)


def test_mutual_information_by_hand() -> None:
    assert mutual_information(torch.tensor([[[5, 0], [5, 5]], [[0, 5], [5, 5]]])) == pytest.approx(math.log(2) / 2)


# --- baselines and merging


def test_an_oracle_says_the_leaf(checkpoint: Path) -> None:
    model = planted(checkpoint, LoRATreeConfig(depth=2, r=3, router="given"))
    with pytest.raises(InputError, match="model.lora_tree.oracle must say the leaf"):
        model(tokens())
    one = load_model(checkpoint, torch.float32)
    inject_lora(one, LoRAConfig(r=3, alpha=16))
    for leaf in range(4):
        model.lora_tree.oracle = lambda ids, documents, leaf=leaf: torch.full_like(ids, leaf)
        layers = dict(tree_layers(model))
        for name, layer in lora_layers(one):
            layer.lora_A.detach().copy_(layers[name].lora_A.view(4, 3, -1)[leaf])
            layer.lora_B.detach().copy_(layers[name].lora_B.view(-1, 4, 3)[:, leaf])
        expected = one(tokens())
        assert relative_error(model(tokens()), expected) <= 1e-5
        assert relative_error(model.train()(tokens()), expected) <= 1e-5
        model.eval()
    assert not any("router" in name for name in trained(model))


def test_the_leaves_of_a_prompt_merge(checkpoint: Path) -> None:
    model, prompt = planted(checkpoint, KINDS["sequence"]), tokens(20, 1)[0].tolist()
    taken = leaves_taken(model, torch.tensor([prompt]))[:, 0, -1]
    for router, leaf in zip(model.lora_tree.routers.values(), taken.tolist(), strict=True):
        router.weight.detach().zero_()  # all tokens as the last of the prompt
        node = 0
        for level in (1, 0):
            right = leaf >> level & 1
            router.bias.detach()[node] = 1.0 if right else -1.0
            node = 2 * node + 1 + right
    expected = model(tokens())
    merge_leaves_of(model, prompt)
    assert relative_error(model(tokens()), expected) <= 1e-5
    plain = load_model(checkpoint, torch.float32)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    inject_lora(model, LoRAConfig())  # nothing of the tree is left


def test_packed_layers_generate_the_same(checkpoint: Path) -> None:
    model = planted(checkpoint, KINDS["block"], dtype=torch.bfloat16)
    before = generate(model, tokens(12), 8)
    pack_linear_layers(model)
    if isinstance(model.lm_head, PackedLinear):  # where the CPU has instructions for it
        assert all(isinstance(layer.base_layer, PackedLinear) for _, layer in tree_layers(model))
    assert generate(model, tokens(12), 8) == before


# --- what is refused


def test_a_foreign_or_damaged_description_is_named(checkpoint: Path, tmp_path: Path) -> None:
    save_adapter(planted(checkpoint, KINDS["block"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    good = json.loads(path.read_text())
    for changes, message in (
        ({"schema_version": 2}, "schema_version = 2 is not supported"),
        ({"scope": "layer"}, "adapter_config.json: lora_tree.scope 'layer'"),
        ({"depth": 3}, "has shape"),
    ):
        path.write_text(json.dumps(good | changes))
        with pytest.raises(InputError, match=message):
            load_adapter(load_model(checkpoint, torch.float32), tmp_path)
    del good["router"]
    path.write_text(json.dumps(good))
    with pytest.raises(InputError, match="adapter_config.json: router is missing"):
        load_adapter(load_model(checkpoint, torch.float32), tmp_path)
