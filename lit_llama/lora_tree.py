"""A binary tree of LoRA adapters: 2^depth leaves on each linear layer, and routers, trained with them, that choose one.

While training every token gets a mixture of all leaves, weighted by sigmoids on the way from the root; losses make
these decided and keep the leaves in use. In evaluation and generation each token goes down to one leaf, so a model
holds 2^depth adapters and computes with one. The idea is that of TrelisResearch/tinyLoRA, which has no code, with the
routing of fast feedforward networks (arXiv 2308.14711).

    model.lora_tree    a `LoRATree`: the routers' common state
    model.auxiliary    the same, as what the training loop asks for its part of the loss

Routers and what they compute are in `lora_tree_routing.py`, the products in `lora_tree_linear.py`. Here: what gets a
router, the adapter directory (own peft_type, LORA_TREE), merging, and what a tree does with a text.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_llama.adapter_files import PEFT_PREFIX, fill_parameters, read_adapter_state, write_adapter
from lit_llama.data.layouts import PADDING_DOCUMENT
from lit_llama.data.packing import TrainingWindows, collate
from lit_llama.data.streaming import StreamedWindows
from lit_llama.errors import InputError
from lit_llama.files import read_json
from lit_llama.generation import evaluating
from lit_llama.hardware import free_memory_gb
from lit_llama.lora import LINEAR_NAMES, LoRAConfig, inject_lora
from lit_llama.lora_linear import dense_weight
from lit_llama.lora_tree_linear import LoRATreeLinear
from lit_llama.lora_tree_routing import LoRATree, Router, decision_entropy, descend
from lit_llama.model import Llama

PEFT_TYPE = "LORA_TREE"
_SCHEMA_VERSION = 1


@dataclass
class LoRATreeConfig:
    """How many leaves, where, and how tokens find them."""

    depth: int = 3
    """Decisions from the root to a leaf: 2^depth leaves. 0: a plain LoRA adapter."""
    r: int = 8
    """Rank of each leaf."""
    alpha: float = 16
    """A leaf's update is scaled by alpha / r."""
    dropout: float = 0.0
    """Probability of dropping an input element on the leaves' path while training."""
    targets: list[str] = field(default_factory=lambda: list(LINEAR_NAMES))
    """Linear layers to adapt: any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""
    scope: Literal["block", "linear", "model"] = "block"
    """Who shares a router: the layers of an attention or of an MLP, which look at the normalised hidden state; none,
    each linear layer looking at its own input; or the whole model, by the token's embedding."""
    route_by: Literal["token", "sequence"] = "token"
    """token: each by itself. sequence: by the mean embedding of the document's first tokens, so that a prompt decides
    for its whole answer."""
    prompt_tokens: int = 64
    """For sequence: how many first tokens; a token among them sees those up to itself."""
    router: Literal["tree", "softmax", "frozen", "given"] = "tree"
    """tree; or to compare with it: softmax, a mixture of top_k experts; frozen, a tree that stays random; given, the
    leaf of each token said from outside (`LoRATree.oracle`)."""
    top_k: int = 2
    """Experts a token, for softmax."""
    router_learning_rate: float = 1.0
    """Of the routers, as a multiple of train.learning_rate."""
    entropy_weight: float = 1.0
    """Of the decisions' mean entropy in the loss, at its most."""
    entropy_warmup: float = 0.15
    """Share of the steps before it counts at all; then it grows evenly until decisions are hard. Leaves start alike:
    routers that had to decide at once would decide by chance."""
    balance_weight: float = 0.01
    """Of uneven use of the branches in the loss; for softmax, of the auxiliary loss of Switch Transformers."""
    region_leak: float = 0.0
    """Probability of swapping the children of a branch for a token while training; up to 0.1 is of use."""
    train_hardened: float = 0.1
    """Share of the steps, the last ones, that train the leaves with hard decisions, the routers staying as they are."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.targets if name not in LINEAR_NAMES]
        if unknown or not self.targets:
            what = f"{unknown[0]!r} is no linear layer of a block" if unknown else "is empty"
            raise InputError(f"lora_tree.targets {what}; choose from {', '.join(LINEAR_NAMES)}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"lora_tree.{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if not 0 <= self.depth <= 40:
            raise InputError(f"lora_tree.depth {self.depth} is not from 0 (plain LoRA) to 40")
        for name in ("r", "prompt_tokens", "top_k"):
            if getattr(self, name) < 1:
                raise InputError(f"lora_tree.{name} {getattr(self, name)} must be at least 1")
        if self.router == "softmax" and self.region_leak:
            raise InputError("lora_tree.region_leak swaps the children of a branch: leave it at 0 with router softmax")
        if self.router == "softmax" and self.top_k > self.leaves:
            raise InputError(f"lora_tree.top_k {self.top_k} is more than the {self.leaves} leaves")
        if self.scope == "linear" and self.route_by == "sequence":
            raise InputError("lora_tree.scope linear looks at each layer's own input: use block or model with sequence")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora_tree.dropout {self.dropout} is not in [0, 1)")
        if not 0 <= self.region_leak <= 0.5:
            raise InputError(f"lora_tree.region_leak {self.region_leak} is not in [0, 0.5]")
        if min(self.entropy_weight, self.balance_weight) < 0 or self.router_learning_rate <= 0:
            raise InputError("lora_tree: weights must not be negative, and router_learning_rate must be above 0")
        if min(self.entropy_warmup, self.train_hardened) < 0 or self.entropy_warmup + self.train_hardened >= 1:
            raise InputError("lora_tree: entropy_warmup and train_hardened are shares of the steps, together below 1")

    @property
    def leaves(self) -> int:
        """Of the tree."""
        return 2**self.depth


_CHOICES = {
    "scope": ("block", "linear", "model"),
    "route_by": ("token", "sequence"),
    "router": ("tree", "softmax", "frozen", "given"),
}


def inject_lora_tree(model: Llama, config: LoRATreeConfig, for_training: bool = True) -> None:
    """Freeze the model and put a tree of adapters on it, in place; depth 0 is `inject_lora`.

    Afterwards the leaves and the routers (fp32) are the only parameters that require a gradient.

    Args:
        for_training: whether gradients and optimizer must find room as well.

    Raises:
        InputError: the model has an adapter already, or the leaves do not fit into the memory of its device.
    """
    if config.depth == 0:
        inject_lora(model, LoRAConfig(config.r, config.alpha, config.dropout, list(config.targets)))
        return
    if any(getattr(model, name, None) is not None for name in ("lora_config", "prompt_tuning_config", "lora_tree")):
        raise InputError("the model carries an adapter already: start from a base, or merge a LoRA adapter first")
    if getattr(model, "mlp_routing", None) is not None:
        raise InputError("the model routes its MLPs: a tree of adapters goes on a model that does not")
    decoder, hidden_size, device = model.model, model.config.hidden_size, model.model.norm.weight.device
    sites = [
        (block_name, block, [name for name in config.targets if isinstance(getattr(block, name, None), nn.Module)])
        for block_name, block in decoder.named_modules()
    ]
    linears = [getattr(block, name) for _, block, targets in sites for name in targets]
    _check_memory(config, sum(linear.in_features + linear.out_features for linear in linears), device, for_training)

    model.requires_grad_(False)
    tree = LoRATree(config)
    tree.handles.append(decoder.register_forward_pre_hook(tree.begin_pass, with_kwargs=True))
    if config.scope == "model":
        decoder.lora_router = tree.routers["model"] = Router(tree, hidden_size, device).train(model.training)
    if config.scope == "model" or config.route_by == "sequence":
        tree.handles.append(decoder.embed_tokens.register_forward_hook(tree.see_embedded))
    for block_name, block, targets in sites:
        if config.scope == "block" and targets:
            block.lora_router = tree.routers[block_name] = Router(tree, hidden_size, device).train(model.training)
            tree.handles.append(block.register_forward_pre_hook(partial(_route_block, tree, block.lora_router)))
        for name in targets:
            linear = getattr(block, name)
            router = tree.routers.get("model" if config.scope == "model" else block_name)
            if config.scope == "linear":
                router = tree.routers[f"{block_name}.{name}"] = Router(tree, linear.in_features, device)
            scaling, owned = config.alpha / config.r, config.scope == "linear"
            wrapped = LoRATreeLinear(linear, config.leaves, config.r, scaling, config.dropout, router, owned)
            setattr(block, name, wrapped.train(model.training))
    model.lora_tree = model.auxiliary = tree


def _route_block(tree: LoRATree, router: Router, block: nn.Module, arguments: tuple) -> None:
    """Hook in front of an attention or an MLP, whose first argument is the normalised hidden state.

    There, and not behind the norm, because there activations that the norm can make again are not kept for a backward.
    """
    router(arguments[0] if tree.pooled is None else tree.pooled)


def _check_memory(config: LoRATreeConfig, widths: int, device: torch.device, for_training: bool) -> None:
    if device.type == "meta":
        return
    parts = "weights, gradients and optimizer" if for_training else "weights"
    needed, free = config.leaves * config.r * widths * (16 if for_training else 4) / 1e9, free_memory_gb(device)
    if needed > free:
        raise InputError(
            f"lora_tree.depth {config.depth}: {config.leaves:,} leaves of rank {config.r} take {needed:,.1f} GB"
            f" ({parts}), {device} has {free:,.1f} GB free; lower depth, r or the number of targets"
        )


def tree_layers(model: nn.Module) -> Iterator[tuple[str, LoRATreeLinear]]:
    """(name, layer) of the wrapped linear layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRATreeLinear))


def tree_summary(model: Llama) -> str:
    """One line for the user."""
    tree: LoRATree = model.lora_tree
    config, layers = tree.config, list(tree_layers(model))
    return (
        f"{config.leaves} leaves of rank {config.r} on each of {len(layers)} layers, {len(tree.routers)} routers"
        f" ({config.router}, {config.scope}, by {config.route_by})"
    )


# --- the adapter directory


def save_lora_tree(model: Llama, adapter_dir: Path | str, base_model: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors; each file is replaced as a whole."""
    description = {"peft_type": PEFT_TYPE, "schema_version": _SCHEMA_VERSION, "task_type": "CAUSAL_LM"}
    description |= {"base_model_name_or_path": base_model, "inference_mode": True, **asdict(model.lora_tree.config)}
    write_adapter(adapter_dir, description, _tree_tensors(model), model.fingerprint)


def load_lora_tree(model: Llama, adapter_dir: Path | str) -> None:
    """Put the tree of a directory on the model.

    Raises:
        InputError: another version, a configuration that is not understood, tensors that do not fit the model, or a
            base other than the one it was trained on.
    """
    config = read_lora_tree_config(adapter_dir)
    state = read_adapter_state(adapter_dir, model.fingerprint)
    inject_lora_tree(model, config, for_training=False)
    fill_parameters(_tree_tensors(model), state, adapter_dir)


def read_lora_tree_config(adapter_dir: Path | str) -> LoRATreeConfig:
    """The configuration of an adapter directory."""
    path = Path(adapter_dir) / "adapter_config.json"
    stated: dict[str, Any] = read_json(path)
    if (version := stated.get("schema_version")) != _SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version = {version!r} is not supported, only {_SCHEMA_VERSION}")
    names = [item.name for item in fields(LoRATreeConfig)]
    if missing := [name for name in names if name not in stated]:
        raise InputError(f"{path}: {missing[0]} is missing")
    try:
        return LoRATreeConfig(**{name: stated[name] for name in names})
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None


def _tree_tensors(model: Llama) -> dict[str, Tensor]:
    """Leaves and routers, which are buffers where they are frozen, by the name they are stored under."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {PEFT_PREFIX + name: tensor for name, tensor in tensors.items() if ".lora_" in name}


# --- one leaf for good


@torch.no_grad()
def merge_leaves_of(model: Llama, prompt_ids: Sequence[int]) -> None:
    """Add to the base weights, in fp32, the leaves that a prompt chooses, and unwrap the layers, in place.

    The model then answers this prompt, and those like it, without an adapter.

    Raises:
        InputError: tokens choose leaves one by one, which no change of the weights does; or the base is quantized.
    """
    tree: LoRATree = model.lora_tree
    refuse_merging(model)
    for name, layer in tree_layers(model):
        if not isinstance(layer.base_layer, nn.Linear):
            raise InputError(f"{name} is quantized: merge into the unquantized base instead")
    with evaluating(model):
        model.model(torch.tensor([list(prompt_ids)], device=model.model.norm.weight.device))
    for name, layer in list(tree_layers(model)):
        (router,) = layer._router
        leaf = int(router.routing.index[-1])
        A = layer.lora_A.unflatten(0, (layer.leaves, -1))[leaf].float()
        B = layer.lora_B.unflatten(1, (layer.leaves, -1))[:, leaf].float()
        merged = dense_weight(layer.base_layer, torch.float32) + layer.scaling * (B @ A)
        layer.base_layer.weight.copy_(merged)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    for handle in tree.handles:
        handle.remove()
    for module in list(model.modules()):
        if isinstance(getattr(module, "lora_router", None), Router):
            del module.lora_router
    model.lora_tree = model.auxiliary = None


def refuse_merging(model: nn.Module) -> None:
    """Raise InputError where leaves are chosen token by token, or mixed."""
    config: LoRATreeConfig = model.lora_tree.config
    if config.route_by == "token" or config.router in ("softmax", "given"):
        raise InputError(
            "a tree routed by token cannot be merged: each token takes another leaf, and a weight is one for all; keep"
            " the adapter, or train with --lora_tree.route_by sequence"
        )


# --- what a tree does with a text


@contextmanager
def soft_routing(model: Llama) -> Iterator[None]:
    """Mix the leaves in evaluation too, for a while: what is lost by deciding is the loss without minus that within."""
    model.lora_tree.soft = True
    try:
        yield
    finally:
        model.lora_tree.soft = None


@torch.no_grad()
def router_logits(model: Llama, input_ids: Tensor, *arguments: Tensor) -> dict[str, Tensor]:
    """What each router says to each token, (batch, length, branches) fp32, by the router's name.

    Args:
        input_ids: (batch, length); `descend` of the result is the leaf that a token takes.
        arguments: position_ids and document_ids, as in `LlamaModel.forward`.
    """
    tree: LoRATree = model.lora_tree
    tree.keep_logits = True
    try:
        with evaluating(model):
            model.model(input_ids, *arguments)
    finally:
        tree.keep_logits = False
    return {name: torch.cat(router.logits).view(*input_ids.shape, -1) for name, router in tree.routers.items()}


def leaf_counts(
    model: Llama, windows: TrainingWindows | StreamedWindows, batch_size: int = 8, max_windows: int = 16
) -> Tensor:
    """Tokens of a text that take each leaf, int64 (routers, leaves), by windows spread evenly over it."""
    return _routing(model, windows, batch_size, max_windows)[0]


def routing_figures(
    model: Llama, windows: TrainingWindows | StreamedWindows, batch_size: int = 8, max_windows: int = 16
) -> dict[str, float]:
    """How the routers decide on a text, mean over the routers; nothing where there are none to decide.

    Returns:
        {"router_entropy": of a decision in nats, "router_decided": share of tokens with all decisions beyond 0.9,
        "leaf_use": entropy of the leaves taken, 1 where all are taken alike, "dead_leaves": share of those that less
        than a hundredth of the tokens take}.
    """
    if getattr(model, "lora_tree", None) is None or model.lora_tree.config.router == "given":
        return {}
    counts, entropy, decided = _routing(model, windows, batch_size, max_windows)
    shares = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    use = torch.special.entr(shares).sum(-1) / math.log(counts.shape[-1])
    return {
        "router_entropy": entropy,
        "router_decided": decided,
        "leaf_use": float(use.mean()),
        "dead_leaves": float((shares < 0.01).double().mean()),
    }


def _routing(
    model: Llama, windows: TrainingWindows | StreamedWindows, batch_size: int, max_windows: int
) -> tuple[Tensor, float, float]:
    """(`leaf_counts`, entropy and share of decided tokens as in `routing_figures`)."""
    tree: LoRATree = model.lora_tree
    count = min(windows.windows_per_epoch, max_windows)
    chosen = [i * windows.windows_per_epoch // count for i in range(count)]
    device, leaves = model.model.norm.weight.device, tree.config.leaves
    counts = torch.zeros(len(tree.routers), leaves, dtype=torch.int64)
    entropy = decided = 0.0
    for start in range(0, count, batch_size):
        batch = collate([windows[i] for i in chosen[start : start + batch_size]])
        input_ids, _, position_ids, document_ids = (tensor.to(device) for tensor in batch[:4])
        real = document_ids != PADDING_DOCUMENT
        for number, logits in enumerate(router_logits(model, input_ids, position_ids, document_ids).values()):
            logits = logits[real]
            if tree.config.router == "softmax":
                taken, probabilities = logits.argmax(-1), torch.softmax(logits, dim=-1)
                entropies, least = torch.special.entr(probabilities).sum(-1), probabilities.amax(-1)
            else:
                taken, entropies = descend(logits), decision_entropy(logits).mean(-1)
                least = torch.sigmoid(logits.abs()).amin(-1)
            counts[number] += torch.bincount(taken, minlength=leaves).cpu()
            entropy += float(entropies.sum())
            decided += float((least > 0.9).sum())
    everything = max(1, int(counts.sum()))
    return counts, entropy / everything, decided / everything


def mutual_information(counts: Tensor) -> float:
    """Of domain and leaf in nats, mean over the routers, by `leaf_counts` of each domain (domains, routers, leaves)."""
    joint = counts.double().transpose(0, 1)
    joint = joint / joint.sum((1, 2), keepdim=True).clamp(min=1)  # (routers, domains, leaves)
    apart = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    return float(torch.xlogy(joint, joint / apart.clamp(min=1e-300)).sum((1, 2)).mean())
