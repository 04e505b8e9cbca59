"""MLPs partitioned into experts, each token going through the best few of them: dense weights made a sparse model.

A SwiGLU MLP is a sum over neurons: row j of gate_proj and of up_proj with column j of down_proj. `partition_mlp` puts
neurons that respond to the same inputs beside each other, which changes nothing; `route_mlp` then lets every token
through `top_k` of the groups only. Trained is nothing new: the experts are the model's own.

    cluster   rows of gate_proj, normalised, into N clusters of equal size
    permute   neurons so that the ones of a cluster lie together: a checkpoint like any other, the same function
    score     s = x R^T, where row e of R is the mean of expert e's rows of gate_proj: its mean pre-activation (avg-k)
    select    the top_k experts of the token, with weight 1; all other neurons count as zero, without a gradient

MoEfication (Zhang et al. 2022, arXiv 2110.01786) found the partition, EMoE (Qiu et al. 2023, arXiv 2310.10908) the
score. LoRA goes on top as on any model (`lora.py`) and its update of gate_proj is part of the score at every step.
Reading and writing checkpoints is `checkpoint.py`, the command `scripts/partition_mlp.py`.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.command_line import counted
from lit_llama.errors import InputError
from lit_llama.files import read_json
from lit_llama.functional import swiglu
from lit_llama.lora_linear import LoRALinear, dense_weight
from lit_llama.model import MLP, Llama

PARTITION_FILE = "mlp_partition.json"
"""In a checkpoint directory: which neuron of the dense model went where."""

ROUTED_LORA = "LORA_ON_ROUTED_MLP"
"""peft_type of a LoRA adapter that was trained with routing. PEFT, which would leave the routing out, refuses it."""

_SCHEMA_VERSION = 1

_ROWS = 32
"""Multiples to which the tokens of an expert are filled up."""


@dataclass(kw_only=True)
class MLPRoutingConfig:
    """Which experts of a partitioned checkpoint a token goes through."""

    top_k: int | None
    """Experts a token; the rest of the MLP counts as zero for it."""
    layers: list[int] | None = None
    """Decoder layers that route, counted from 0; the others stay whole. None: all that are partitioned."""
    route: Literal["both", "train", "generate"] = "both"
    """Route in training and in generation, evaluation included, or in one of them only."""
    path: Literal["masked", "blocks"] = "masked"
    """What routing computes without a gradient: everything, masking what is not selected, or only the selected experts'
    blocks, which pays for wide MLPs. Equal up to rounding. With a gradient, or where blocks cannot be read in place
    (quantized, DoRA), it is masked."""

    def __post_init__(self) -> None:
        for name, allowed in (("route", ("both", "train", "generate")), ("path", ("masked", "blocks"))):
            if getattr(self, name) not in allowed:
                raise InputError(f"partition.{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")


@dataclass(kw_only=True)
class MLPPartitionConfig(MLPRoutingConfig):
    """How MLPs are partitioned and, with `top_k`, routed."""

    n_experts: int = 32
    """Groups of each MLP; must divide its width."""
    top_k: int | None = None
    """Experts a token. None: only partition, which does not change what the model computes."""
    clusters: Literal["kmeans", "random"] = "kmeans"
    """Neurons that respond alike, or random groups: the control that shows what clustering is worth."""
    seed: int = 0
    """Of the clustering."""
    iterations: int = 100
    """At most so many rounds of k-means a layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters not in ("kmeans", "random"):
            raise InputError(f"clusters {self.clusters!r} is not one of kmeans, random")


class LayerPartition(NamedTuple):
    """How one MLP was partitioned."""

    labels: list[int]
    """The expert of each neuron, in the order of the dense model."""
    distance: float
    """Mean squared distance of the normalised gate rows to the means of their clusters."""
    random_distance: float
    """The same for random clusters of that size."""

    @property
    def permutation(self) -> Tensor:
        """Neurons of the dense model in their new order, int64 (width,): permuted = dense[permutation]."""
        return torch.tensor(self.labels).argsort(stable=True)


@dataclass
class MLPPartition:
    """What is known of a partitioned model: `Llama.mlp_partition`, stored beside its weights."""

    n_experts: int
    clusters: str
    seed: int
    layers: dict[int, LayerPartition]

    def save(self, directory: Path) -> None:
        """Write mlp_partition.json; for use inside `files.atomic_directory`."""
        layers = {
            number: {**layer._asdict(), "permutation": layer.permutation.tolist()}
            for number, layer in self.layers.items()
        }
        stated = {"n_experts": self.n_experts, "clusters": self.clusters, "seed": self.seed, "layers": layers}
        text = json.dumps({"schema_version": _SCHEMA_VERSION, **stated})
        (directory / PARTITION_FILE).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def load(cls, checkpoint_dir: Path) -> "MLPPartition | None":
        """What the directory says; None where it holds a model that is not partitioned.

        Raises:
            InputError: an unreadable file, or of another schema version.
        """
        path = checkpoint_dir / PARTITION_FILE
        if not path.exists():
            return None
        stated = read_json(path)
        broken = f"{path}: not what scripts/partition_mlp.py writes; partition the checkpoint again"
        if not isinstance(stated, dict) or stated.pop("schema_version", None) != _SCHEMA_VERSION:
            raise InputError(f"{broken} (expected schema_version {_SCHEMA_VERSION})")
        try:
            layers = {
                int(number): LayerPartition(layer["labels"], layer["distance"], layer["random_distance"])
                for number, layer in stated.pop("layers").items()
            }
            return cls(**stated, layers=layers)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(broken) from None


def partition_mlp(model: Llama, config: MLPPartitionConfig) -> MLPPartition:
    """Reorder the neurons of the chosen layers by cluster, in place, and route if `config.top_k` says so.

    Returns:
        What was done, also kept as `model.mlp_partition`.

    Raises:
        InputError: `n_experts` does not divide the width, there are no such layers or experts, the model is partitioned
            or quantized already, or it carries an adapter.
    """
    if getattr(model, "mlp_partition", None) is not None:
        raise InputError("the model is partitioned already: start from the dense checkpoint that it was made of")
    layers = _checked_layers(config.layers, range(model.config.num_hidden_layers), "the model has")
    width, count = model.config.intermediate_size, config.n_experts
    if count < 1 or width % count:
        near = [n for n in range(1, width + 1) if width % n == 0 and count / 4 <= n <= 4 * max(count, 1)]
        raise InputError(f"n_experts {count} does not divide the MLP's width of {width}; these do: {near}")
    _check_top_k(config.top_k, count)
    if any(getattr(model, name, None) is not None for name in ("lora_config", "prompt_tuning_config", "lora_tree")):
        raise InputError("the model carries an adapter: merge it first, or partition the base and train anew")
    for number in layers:
        for name, projection in model.model.layers[number].mlp.named_children():
            if not isinstance(projection, nn.Linear):
                raise InputError(
                    f"layer {number}: {name} is quantized, and packed weights cannot be reordered: partition the"
                    " unquantized checkpoint and quantize that when it is loaded"
                )
    partition = MLPPartition(count, config.clusters, config.seed, {})
    with counted("MLPs partitioned") as show:
        for done, number in enumerate(layers, start=1):
            mlp = model.model.layers[number].mlp
            rows = F.normalize(mlp.gate_proj.weight.detach().float().cpu(), dim=1)
            labels = random = _random_labels(width, count, config.seed + number)
            if config.clusters == "kmeans":
                labels = balanced_kmeans(rows, count, config.iterations, config.seed + number)
            distances = (mean_squared_distance(rows, found, count) for found in (labels, random))
            partition.layers[number] = LayerPartition(labels.tolist(), *distances)
            permute_mlp_(mlp, partition.layers[number].permutation)
            show(done, len(layers))
    model.mlp_partition = partition
    if config.top_k is not None:
        route_mlp(model, config)
    return partition


def balanced_kmeans(rows: Tensor, n_clusters: int, iterations: int = 100, seed: int = 0) -> Tensor:
    """k-means with clusters of equal size.

    Rounds of assigning rows to centroids and moving these to the means, from centroids far apart (k-means++, Arthur &
    Vassilvitskii 2007), until the objective falls by less than a millionth. Each assignment is the best one that
    keeps the sizes, so no round raises it.

    Args:
        rows: fp32 (h, d) on the CPU; `n_clusters` divides h.
        seed: of the first centroids.

    Returns:
        Labels, int64 (h,).
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(rows), (), generator=generator))]
    nearest = torch.full((len(rows),), torch.inf)
    while len(chosen) < n_clusters:
        nearest = nearest.minimum((rows - rows[chosen[-1]]).square().sum(1)).clamp_min(1e-9)
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
    centroids = rows[chosen]
    members = np.arange(len(rows)).reshape(n_clusters, -1)
    before = float("inf")
    for _ in range(iterations):
        # Squared distances, less the rows' own norms, which no assignment changes.
        cost = (centroids.square().sum(1) - 2 * rows @ centroids.T).double().T.contiguous().numpy()
        _assign(cost, members)
        centroids = rows[torch.from_numpy(members)].mean(1)
        total = float((rows[torch.from_numpy(members)] - centroids[:, None]).square().sum())
        if total > before * (1 - 1e-6):
            break
        before = total
    labels = torch.empty(len(rows), dtype=torch.int64)
    labels[torch.from_numpy(members)] = torch.arange(n_clusters)[:, None]
    return labels


def _assign(cost: np.ndarray, members: np.ndarray) -> None:
    """Move rows between clusters, whose sizes stay, until the summed cost is the least there is; in place.

    First rows of two clusters are exchanged while that lowers the sum; then rows are passed on around cycles of
    clusters. Where no cycle lowers it nothing does (Klein 1967).

    Args:
        cost: (clusters, rows) of a row in a cluster.
        members: (clusters, size), the rows of each cluster.
    """
    clusters = range(len(members))
    found = True
    while found:
        found = False
        for a, b in combinations(clusters, 2):
            in_a, in_b = members[a], members[b]
            gain_a, gain_b = cost[a][in_a] - cost[b][in_a], cost[b][in_b] - cost[a][in_b]
            from_a, from_b = np.argsort(-gain_a, kind="stable"), np.argsort(-gain_b, kind="stable")
            count = int((gain_a[from_a] + gain_b[from_b] > 1e-9).sum())
            if count:
                found = True
                from_a, from_b = from_a[:count], from_b[:count]
                in_a[from_a], in_b[from_b] = in_b[from_b], in_a[from_a]

    rises = np.empty((len(members), len(members)))  # [a, b]: the least that moving a row of a to b adds
    places = np.empty(rises.shape, dtype=np.int64)  # where in a that row is
    cycle: Sequence[int] = clusters
    while cycle:
        for a in cycle:
            moved = cost[:, members[a]] - cost[a, members[a]]
            places[a] = moved.argmin(1)
            rises[a] = moved.min(1)
        cycle = _falling_cycle(rises)
        left = [(a, places[a, b]) for a, b in zip(cycle, [*cycle[1:], *cycle[:1]], strict=True)]
        rows = [members[place] for place in left]
        for place, row in zip(left, [*rows[-1:], *rows[:-1]], strict=True):
            members[place] = row


def _falling_cycle(rises: np.ndarray) -> list[int]:
    """Nodes, in order, of a cycle whose rises (n, n) sum to less than 0; [] where there is none (Bellman-Ford)."""
    least, before = np.zeros(len(rises)), np.zeros(len(rises), dtype=np.int64)
    for _ in range(len(rises)):
        through = least[:, None] + rises
        better = through.min(0) < least - 1e-9
        if not better.any():
            return []
        before[better] = through.argmin(0)[better]
        least = np.where(better, through.min(0), least)
    node = int(np.flatnonzero(better)[0])
    for _ in range(len(rises)):
        node = int(before[node])
    cycle = [node]
    while (node := int(before[node])) != cycle[0]:
        cycle.append(node)
    return cycle[::-1]


def _random_labels(width: int, n_experts: int, seed: int) -> Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed)) % n_experts


def mean_squared_distance(rows: Tensor, labels: Tensor, n_clusters: int) -> float:
    """Of rows (h, d) to the means of their clusters, which are of equal size: the objective of k-means over h."""
    grouped = rows[labels.argsort(stable=True)].unflatten(0, (n_clusters, -1))
    return float((grouped - grouped.mean(1, keepdim=True)).square().sum() / len(rows))


def permute_mlp_(mlp: MLP, permutation: Tensor) -> None:
    """Give an unquantized MLP's neurons another order, int64 (width,), in place: the same function."""
    for projection, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
        weight = projection.weight
        permuted = weight.detach().index_select(dim, permutation.to(weight.device))
        projection.weight = nn.Parameter(permuted, requires_grad=weight.requires_grad)


def route_mlp(model: Llama, config: MLPRoutingConfig) -> None:
    """Let the tokens of a partitioned model through `config.top_k` experts only, in place; kept as `model.mlp_routing`.

    Before or after an adapter is put on it.

    Raises:
        InputError: the model is not partitioned or routes otherwise already, or has no such layers or experts.
    """
    partition: MLPPartition | None = getattr(model, "mlp_partition", None)
    if partition is None:
        raise InputError("the checkpoint is not partitioned: make a partitioned one with scripts/partition_mlp.py")
    if getattr(model, "lora_tree", None) is not None:
        raise InputError("routed MLPs do not go with a tree of adapters, which changes gate_proj token by token")
    if config.top_k is None:
        raise InputError("partition.top_k says how many experts a token goes through; give it")
    _check_top_k(config.top_k, partition.n_experts)
    layers = _checked_layers(config.layers, partition.layers.keys(), "the checkpoint is partitioned in")
    config = MLPRoutingConfig(top_k=config.top_k, layers=layers, route=config.route, path=config.path)
    before = getattr(model, "mlp_routing", None)
    if before not in (None, config):
        raise InputError(f"the model routes already by {asdict(before)}; it cannot also route by {asdict(config)}")
    if before is None:
        for number in layers:
            layer = model.model.layers[number]
            layer.mlp = PartitionedMLP(layer.mlp, partition.n_experts, config)
        model.mlp_routing = config


def routing_record(model: nn.Module) -> dict[str, Any]:
    """What an adapter's adapter_config.json says besides, where the model routes; see `route_as_recorded`."""
    routing: MLPRoutingConfig | None = getattr(model, "mlp_routing", None)
    if routing is None:
        return {}
    return {"peft_type": ROUTED_LORA, "schema_version": _SCHEMA_VERSION, "mlp_routing": asdict(routing)}


def route_as_recorded(model: Llama, adapter_dir: Path | str) -> None:
    """Route as the run did that made an adapter directory; nothing where it did not.

    Raises:
        InputError: as `route_mlp`, or a record of another version.
    """
    path = Path(adapter_dir) / "adapter_config.json"
    stated = read_json(path)
    if stated.get("peft_type") != ROUTED_LORA:
        return
    if stated.get("schema_version") != _SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version {stated.get('schema_version')!r} is not {_SCHEMA_VERSION}")
    try:
        route_mlp(model, MLPRoutingConfig(**stated["mlp_routing"]))
    except (KeyError, TypeError):
        raise InputError(f"{path}: mlp_routing is not what a run with --partition writes") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _check_top_k(top_k: int | None, n_experts: int) -> None:
    if top_k is not None and not 1 <= top_k <= n_experts:
        raise InputError(f"top_k {top_k} is not from 1 to {n_experts}, the experts that there are")


def _checked_layers(wanted: list[int] | None, available: Collection[int], whose: str) -> list[int]:
    """Layer numbers in order, all that are available where none are named."""
    available = sorted(available)
    if wanted is None:
        return available
    if unknown := sorted(set(wanted) - set(available)):
        raise InputError(f"there is no layer {unknown[0]} to partition or route: {whose} {available}")
    if not wanted:
        raise InputError("the list of layers to partition or route is empty")
    return sorted(set(wanted))


class PartitionedMLP(MLP):
    """An MLP whose neurons lie by expert, of which each token goes through `top_k`."""

    def __init__(self, mlp: MLP, n_experts: int, config: MLPRoutingConfig) -> None:
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.recompute_cheap, self.tiles = mlp.recompute_cheap, mlp.tiles
        self.n_experts, self.top_k, self.route, self.path = n_experts, config.top_k, config.route, config.path
        weight = dense_weight(getattr(mlp.gate_proj, "linear", mlp.gate_proj), torch.float32)
        self.expert_size = len(weight) // n_experts
        self.register_buffer("gate_means", self._means(weight), persistent=False)  # (n_experts, hidden)
        self.packed: list[Sequence[nn.Module]] | None = None
        """Of each expert its blocks of gate, up and down laid out for generation (`packed_linear.py`)."""
        self.train(mlp.training)

    def _means(self, rows: Tensor) -> Tensor:
        """(width, n) -> (n_experts, n), without a gradient."""
        return rows.detach().unflatten(0, (self.n_experts, -1)).mean(1)

    def score_weight(self) -> Tensor:
        """R, fp32 (n_experts, hidden): each expert's mean row of gate_proj as it is now, with its LoRA update."""
        gate = self.gate_proj
        if isinstance(gate, LoRALinear):
            if gate.lora_magnitude_vector is not None:  # rows scaled one by one: their mean takes all of them
                return self._means(gate.merged_weight())
            lora_A, lora_B = gate.factors()
            return self.gate_means.float() + gate.scaling * self._means(lora_B).float() @ lora_A.detach().float()
        if isinstance(gate, nn.Linear) and gate.weight.requires_grad:
            return self._means(gate.weight.float())
        return self.gate_means.float()

    @torch.no_grad()
    def select(self, x: Tensor) -> Tensor:
        """The experts of each token of x (..., hidden): int64 (..., top_k), best first."""
        return (x.float() @ self.score_weight().T).topk(self.top_k, dim=-1).indices

    def feed_forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) through the MLP at once: whole, or each token through its experts, as the run says."""
        if self.route == ("generate" if self.training else "train"):
            return super().feed_forward(x)
        if self.path == "masked" or self.training or torch.is_grad_enabled() or not self.blocks_readable():
            return self.masked(x)
        rows = x.flatten(0, -2)
        # On a CPU a row that is generated alone has itself for companion (`generation.py`).
        alone = len(rows) == 1 or (len(rows) == 2 and torch.equal(rows[0], rows[1]))
        return (self.decode(rows) if alone else self.grouped(rows)).view(x.shape)

    def masked(self, x: Tensor) -> Tensor:
        """All neurons are computed, and those of experts that a token does not go through are set to zero."""
        chosen = self.select(x)
        mask = torch.zeros(*x.shape[:-1], self.n_experts, dtype=x.dtype, device=x.device).scatter_(-1, chosen, 1.0)
        return self.combine(self.gate_proj(x), self._of_selected(self.up_proj(x), mask))

    def _of_selected(self, neurons: Tensor, mask: Tensor) -> Tensor:
        """(..., width) times the mask (..., n_experts) of each one's expert."""
        return (neurons.unflatten(-1, (self.n_experts, -1)) * mask.unsqueeze(-1)).flatten(-2)

    def blocks_readable(self) -> bool:
        """Whether an expert's part of the weights is a part of a matrix in memory."""
        return all(
            isinstance(getattr(projection, "linear", projection), nn.Linear)
            and getattr(projection, "lora_magnitude_vector", None) is None
            for projection in self.children()
        )

    def blocks(self, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Parts of gate (n, hidden), up (n, hidden) and down (hidden, n) that are the experts first, ..., end - 1."""
        gate, up, down = (getattr(projection, "linear", projection).weight for projection in self.children())
        neurons = self._neurons(first, end)
        return gate[neurons], up[neurons], down[:, neurons]

    def _neurons(self, first: int, end: int) -> slice:
        return slice(first * self.expert_size, end * self.expert_size)

    def grouped(self, rows: Tensor) -> Tensor:
        """rows (tokens, hidden), each expert's tokens gathered and multiplied with its blocks alone; no gradient."""
        chosen = self.select(rows).flatten()
        tokens = chosen.argsort(stable=True) // self.top_k  # those of the first expert, of the second, ...
        output = torch.zeros_like(rows)
        for expert, own in enumerate(tokens.split(chosen.bincount(minlength=self.n_experts).tolist())):
            count = len(own)
            if count:
                # Some more rows at most: on a CPU a kernel is built for each number of them, which takes its time.
                filled = F.pad(own, (0, -count % _ROWS if count > _ROWS else 0))
                output.index_add_(0, own, self._through(expert, expert + 1, rows[filled])[:count])
        return output

    def decode(self, rows: Tensor) -> Tensor:
        """rows (tokens, hidden), all through the experts of the first; weights are read in place, those of adjacent
        experts at once; no gradient."""
        chosen = set(self.select(rows[0]).tolist())
        joined = self.packed is None
        firsts = sorted(expert for expert in chosen if not (joined and expert - 1 in chosen))
        ends = sorted(expert + 1 for expert in chosen if not (joined and expert + 1 in chosen))
        return sum(self._through(first, end, rows) for first, end in zip(firsts, ends, strict=True))

    def _through(self, first: int, end: int, rows: Tensor) -> Tensor:
        """rows (tokens, hidden) through the experts first, ..., end - 1."""
        if self.packed is None:
            gate, up, down = (partial(F.linear, weight=block) for block in self.blocks(first, end))
        else:
            gate, up, down = self.packed[first]
        neurons = self._neurons(first, end)
        gated = _add_update_(gate(rows), rows, self.gate_proj, rows=neurons)
        product = swiglu(gated, _add_update_(up(rows), rows, self.up_proj, rows=neurons))
        return _add_update_(down(product), product, self.down_proj, columns=neurons)


def _add_update_(
    output: Tensor, x: Tensor, projection: nn.Module, rows: slice = slice(None), columns: slice = slice(None)
) -> Tensor:
    """Add to a block of a linear layer's product what its LoRA update makes of x, if it has one, in place."""
    if isinstance(projection, LoRALinear):
        lora_A, lora_B = projection.factors()
        low = x @ lora_A[:, columns].to(x.dtype).T
        output.addmm_(low, lora_B[rows].to(x.dtype).T, alpha=projection.scaling)
    return output


def partitioned_mlps(model: nn.Module) -> Iterator[PartitionedMLP]:
    """The MLPs that route."""
    return (module for module in model.modules() if isinstance(module, PartitionedMLP))
