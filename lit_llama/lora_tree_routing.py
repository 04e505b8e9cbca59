"""Which leaf of a tree of adapters a token takes: routers, the greedy descent, what keeps them decided and balanced.

A tree of depth d has 2^d leaves and 2^d - 1 branches in heap order: the children of branch n are 2n + 1 (left) and
2n + 2 (right). A branch looks at x, brought to root mean square 1, in fp32 (fast feedforward networks, Belcak &
Wattenhofer 2023, arXiv 2308.14711):

    z_n = w_n x / rms(x) + b_n            p_n = sigmoid(z_n), the probability of the right child
    soft, in training                     weight of a leaf = product of p or 1 - p on the way to it; they sum to 1
    hard, in evaluation and generation    from the root, right where z_n >= 0: one leaf

Not here: the products with a leaf's factors (`lora_tree_linear.py`), what gets a router and how it is saved
(`lora_tree.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lit_llama.data.layouts import PADDING_DOCUMENT
from lit_llama.errors import InputError
from lit_llama.kv_cache import KVCache

if TYPE_CHECKING:
    from lit_llama.lora_tree import LoRATreeConfig


def leaf_weights(logits: Tensor) -> Tensor:
    """Weights (..., 2^d) of the leaves, from the left, by the branches' logits (..., 2^d - 1)."""
    weights = torch.ones_like(logits[..., :1])
    for level in _levels(logits):
        # sigmoid(-z) instead of 1 - p: exact where p is nearly 1.
        weights = torch.stack((weights * torch.sigmoid(-level), weights * torch.sigmoid(level)), dim=-1).flatten(-2)
    return weights


def descend(logits: Tensor) -> Tensor:
    """The leaf (...) int64 that a greedy descent reaches; not always the one of the largest weight."""
    branches = logits.shape[-1]
    # The child that each branch would choose, at once: on a GPU a kernel a level is left.
    children = torch.arange(1, 2 * branches, 2, device=logits.device) + (logits >= 0)
    node = children[..., :1]
    for _ in _levels(logits)[1:]:
        node = children.gather(-1, node)
    return node[..., 0] - branches


def decision_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each decision, -p log p - (1 - p) log(1 - p), in a form that is exact for any z."""
    return F.softplus(logits) - logits * torch.sigmoid(logits)


def tree_balance(logits: Tensor, weights: Tensor) -> Tensor:
    """How far the branches are from sending half of what reaches them to each side: 0 (even) to 1 (all one way).

    With E_n the mean of p_n over the tokens, each weighted by the probability that it reaches n: the mean over the
    branches of 4 (E_n - 1/2)^2, each weighted by how much reaches it.

    Args:
        logits: (rows, branches).
        weights: (rows,) 1, or 0 for rows that do not count.
    """
    reach, total, depth = weights[:, None], logits.new_zeros(()), 0
    for level in _levels(logits):
        right = reach * torch.sigmoid(level)
        mass = reach.sum(0)
        mean = right.sum(0) / mass.clamp(min=torch.finfo(mass.dtype).tiny)
        total = total + (mass * 4 * (mean - 0.5).square()).sum()
        reach, depth = torch.stack((reach - right, right), dim=-1).flatten(-2), depth + 1
    return total / (depth * weights.sum().clamp(min=1))


def _levels(logits: Tensor) -> list[Tensor]:
    """The branches' logits level by level, the root's first."""
    depth = (logits.shape[-1] + 1).bit_length() - 1
    return [logits[..., 2**level - 1 : 2 ** (level + 1) - 1] for level in range(depth)]


def top_k_weights(logits: Tensor, k: int) -> Tensor:
    """Weights (..., leaves) of a mixture of experts: softmax over all, the k largest kept and made to sum to 1."""
    largest, indices = torch.softmax(logits, dim=-1).topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, indices, largest / largest.sum(-1, keepdim=True))


def expert_balance(logits: Tensor, k: int, weights: Tensor) -> Tensor:
    """Auxiliary loss of Switch Transformers (Fedus et al. 2021, arXiv 2101.03961, equation 4): L sum_e f_e P_e.

    f_e is the share of the tokens' k choices that fall on e, P_e its mean probability; 1 at best.
    """
    probabilities = torch.softmax(logits, dim=-1)
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(k, dim=-1).indices, 1.0 / k)
    count = weights.sum().clamp(min=1)
    shares, means = ((weights[:, None] * values).sum(0) / count for values in (chosen, probabilities))
    return logits.shape[-1] * (shares.detach() * means).sum()


class RouterLogitsFunction(torch.autograd.Function):
    """z = W x / rms(x) + b, (rows, branches), in fp32 whatever x's dtype: bf16 would turn close decisions.

    What a model's norms give is not at that scale (in the first layers of SmolLM2-135M at 0.07 to 0.3), and a bias
    would decide alone beside it. Saves x as it is, no fp32 copy.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(_at_unit_scale(x, weight.dtype)[0], weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        normed, scale = _at_unit_scale(x, weight.dtype)
        grad_x = None
        if need_x:
            grad_normed = grad_logits @ weight
            projection = (grad_normed * normed).mean(-1, keepdim=True)
            grad_x = grad_normed.addcmul_(normed, projection, value=-1).mul_(scale).to(x.dtype)
        grad_weight = grad_logits.T @ normed if need_weight else None
        return grad_x, grad_weight, grad_logits.sum(0) if need_bias else None


def _at_unit_scale(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / rms(x), 1 / rms(x) (rows, 1)) in `dtype`."""
    x = x.to(dtype)
    scale = x.square().mean(-1, keepdim=True).add_(torch.finfo(dtype).eps ** 2).rsqrt_()
    return x * scale, scale


@dataclass(frozen=True)
class Leaves:
    """The leaf of each token of a pass; what follows from it is worked out once for all layers that share it."""

    index: Tensor
    """(rows,) int64."""
    count: int
    """Leaves that there are."""

    def rows(self, start: int, length: int) -> "Leaves":
        """Those of some of the tokens."""
        return Leaves(self.index[start : start + length], self.count)

    @cached_property
    def mask(self) -> Tensor:
        """True at the leaf of each row, bool (rows, leaves)."""
        return self.index[:, None] == torch.arange(self.count, device=self.index.device)

    @cached_property
    def segments(self) -> tuple[Tensor, list[int]]:
        """(rows ordered by leaf (rows,), rows of each leaf). Waits for the device."""
        return torch.argsort(self.index, stable=True), torch.bincount(self.index, minlength=self.count).tolist()


class Router(nn.Module):
    """Decides for the linear layers that share it; they find the decision in `routing`."""

    def __init__(self, tree: "LoRATree", in_features: int, device: torch.device) -> None:
        super().__init__()
        config = tree.config
        self._tree = (tree,)  # in a tuple: it holds this module
        self.routing: Tensor | Leaves | None = None
        """Of the pass under way: weights (rows, leaves) in fp32, or the leaf of each row."""
        self.logits: list[Tensor] = []
        """Of the pass under way, (rows, branches) each, while `LoRATree.collecting`."""
        if config.router == "given":
            return
        if config.router == "softmax":
            weight, bias = torch.randn(config.leaves, in_features, device=device) * 0.02, None
        else:
            bound = 1 / math.sqrt(in_features)
            weight = torch.empty(config.leaves - 1, in_features, device=device).uniform_(-bound, bound)
            bias = torch.empty(config.leaves - 1, device=device).uniform_(-bound, bound)
        for name, tensor in (("weight", weight), ("bias", bias)):
            if config.router == "frozen":
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    def forward(self, x: Tensor) -> None:
        """Decide by x (..., in)."""
        (tree,) = self._tree
        config = tree.config
        if config.router == "given":
            self.routing = Leaves(tree.given, config.leaves)
            return
        logits = RouterLogitsFunction.apply(x.flatten(0, -2), self.weight, self.bias)
        soft = tree.soft if tree.soft is not None else self.training and not tree.hardened
        if self.training and soft and config.region_leak:
            logits = torch.where(torch.rand_like(logits) < config.region_leak, -logits, logits)
        if tree.collecting:
            self.logits.append(logits)
        if config.router == "softmax":
            self.routing = top_k_weights(logits, config.top_k)
        else:
            self.routing = leaf_weights(logits) if soft else Leaves(descend(logits), config.leaves)

    def penalty(self, weights: Tensor | None, entropy_weight: float) -> Tensor:
        """What the decisions of the pass add to the loss, fp32 scalar.

        Args:
            weights: (rows,) 1, or 0 for padding; None: all rows count.
        """
        (tree,) = self._tree
        config, logits = tree.config, torch.cat(self.logits)
        if weights is None:
            weights = logits.new_ones(len(logits))
        if config.router == "softmax":
            return config.balance_weight * expert_balance(logits, config.top_k, weights)
        entropy = (weights @ decision_entropy(logits)).mean() / weights.sum().clamp(min=1)
        return entropy_weight * entropy + config.balance_weight * tree_balance(logits, weights)


class LoRATree:
    """What the routers of a model share: how far training is, and the pass under way. It is `model.lora_tree`.

    Attributes:
        soft: mix the leaves (true) or descend (false) whatever the mode; None: mix in training only.
        oracle: for router "given": the leaf (batch, length) of each token, by input_ids and document_ids (or None).
    """

    def __init__(self, config: "LoRATreeConfig") -> None:
        self.config = config
        self.routers: dict[str, Router] = {}
        self.handles: list[Any] = []
        self.soft: bool | None = None
        self.oracle: Callable[[Tensor, Tensor | None], Tensor] | None = None
        self.hardened = config.router == "frozen"
        self.entropy_weight = 0.0
        self.collecting = self.keep_logits = False
        self.weights: Tensor | None = None
        """Of the pass under way, (rows,): 0 where there is padding."""
        self.given: Tensor | None = None
        self.pooled: Tensor | None = None
        """Of the pass under way, what routers look at where `route_by` is "sequence": (batch, length, hidden) fp32."""
        self._documents_and_cache: tuple[Tensor | None, KVCache | None] = (None, None)

    # --- a training run

    def start_step(self, done: float) -> None:
        """Set what depends on how much of the run is done, 0 to 1, before a step."""
        config = self.config
        softly = 1 - config.train_hardened
        ramp = (done - config.entropy_warmup) / (softly - config.entropy_warmup)
        self.entropy_weight = config.entropy_weight * min(1.0, max(0.0, ramp))
        self.hardened = config.router == "frozen" or (config.router == "tree" and done >= softly)

    def loss(self) -> Tensor:
        """What the routers add to the mean loss of the pass just made, fp32 scalar, mean over the routers."""
        self.collecting = False
        routers = [router for router in self.routers.values() if router.logits]
        if not routers or not self.hardened:
            terms = [router.penalty(self.weights, self.entropy_weight) for router in routers]
        else:
            # Without effect; data-parallel wrappers wait for a gradient of everything that may have one.
            terms = [0.0 * logits.sum() for router in routers for logits in router.logits]
        for router in routers:
            router.logits = []
        return torch.stack(terms).mean() if terms else torch.zeros(())

    def before_update(self) -> None:
        """Between backward and update: routers no longer learn once decisions are hard, not even by momentum."""
        if self.hardened:
            for router in self.routers.values():
                for parameter in router.parameters():
                    parameter.grad = None

    # --- a forward pass

    def begin_pass(self, module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        """Hook in front of `LlamaModel.forward`: note what the routers will need of its arguments."""
        names = ("input_ids", "position_ids", "document_ids", "cache")
        given = dict.fromkeys(names) | dict(zip(names, arguments, strict=False)) | keywords
        documents = given["document_ids"]
        self.weights = None if documents is None else (documents != PADDING_DOCUMENT).flatten().float()
        learning = module.training and torch.is_grad_enabled() and self.config.router in ("tree", "softmax")
        self.collecting = self.keep_logits or learning
        for router in self.routers.values():
            router.logits = []
        if self.config.router == "given":
            if self.oracle is None:
                raise InputError("lora_tree.router given: model.lora_tree.oracle must say the leaf of each token")
            self.given = self.oracle(given["input_ids"], documents).flatten()
        if self.config.route_by == "sequence":
            self._documents_and_cache = (documents, given["cache"])

    def see_embedded(self, module: nn.Module, arguments: tuple, embedded: Tensor) -> None:
        """Hook behind `embed_tokens`: what routers look at that do not look into a block."""
        embedded = embedded.detach()
        if self.config.route_by == "sequence":
            embedded = prompt_mean(embedded.float(), self.config.prompt_tokens, *self._documents_and_cache)
            self.pooled = embedded
            self._documents_and_cache = (None, None)  # a cache shall not outlive its generation here
        if self.config.scope == "model":
            self.routers["model"](embedded)


def prompt_mean(embedded: Tensor, limit: int, document_ids: Tensor | None, cache: KVCache | None) -> Tensor:
    """For each token the mean embedding of its document's first `limit` tokens, of those that are not behind it.

    So no token is routed by what follows it, and all from the `limit`-th on are routed alike. While decoding (a token
    at a time onto a cache) what the prompt gave is kept.

    Args:
        embedded: (batch, length, hidden) fp32.
        document_ids: (batch, length) as in `LlamaModel.forward`, or None.
        cache: of the pass, which has not been made yet; it remembers the sums of its rows.

    Returns:
        (batch, length, hidden) fp32.
    """
    batch, length, _ = embedded.shape
    places = torch.arange(length, device=embedded.device).expand(batch, -1)
    starts = torch.zeros_like(places)
    if cache is not None:
        if cache.length and length == 1:
            return (cache.row_state["sum"] / cache.row_state["count"].clamp(min=1))[:, None]
        starts = starts - cache.length if cache.padding is None else cache.padding[:, None] - cache.length
    elif document_ids is not None:
        begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
        starts = torch.where(begins, places, 0).cummax(dim=1).values
    counted = ((places >= starts) & (places - starts < limit)).to(embedded.dtype)[..., None]
    sums, counts = (embedded * counted).cumsum(1), counted.cumsum(1)
    if cache is not None:
        if cache.length:
            sums = sums + cache.row_state["sum"][:, None]
            counts = counts + cache.row_state["count"][:, None]
        cache.row_state = {"sum": sums[:, -1], "count": counts[:, -1]}
    elif document_ids is not None:
        before = (starts - 1).clamp(min=0)[..., None]
        first = (starts == 0)[..., None]
        sums = sums - sums.gather(1, before.expand_as(sums)).masked_fill(first, 0)
        counts = counts - counts.gather(1, before).masked_fill(first, 0)
    return sums / counts.clamp(min=1)
