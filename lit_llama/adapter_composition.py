"""Several LoRA adapters of one base -> one adapter: weighted sums, exact or at a lower rank, and pruning merges.

An adapter is an update D_i = s_i B_i A_i of each layer, s_i its scaling. With weights w_i:

    cat              sum w_i D_i, exactly: factors side by side, so that the rank is the sum of the ranks
    svd              the best approximation of that sum by a lower rank (Eckart & Young 1936)
    linear           A = sum +-sqrt(|w_i s_i|) A_i with the sign of w_i, B = sum sqrt(|w_i s_i|) B_i: keeps the rank,
                     and is rough, for B A then holds the products B_i A_j of different adapters too
    magnitude_prune  linear, of the largest entries of each A_i and B_i, a share `density` of them
    ties             pruned likewise, then, entry by entry, the weighted mean of those adapters whose sign is that of
                     the majority (Yadav et al. 2023, arXiv 2306.01708)
    dare_linear      linear, of entries kept at random and divided by `density` (Yu et al. 2024, arXiv 2311.03099)
    dare_ties        ties, pruned in that way
    NAME_svd         of these four: NAME on the updates D_i instead of the factors, then the best approximation

Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089) is cat or svd with weights [1, 1], [1, -1], ...; interpolation
has weights [1 - t, t]. The results and the names are those of PEFT's `add_weighted_adapter`, with two exceptions: a
single adapter is treated as several are, so that svd lowers its rank, and the result of rsLoRA adapters has scaling 1
like any other. First the computation, then the adapter directories around it.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open
from torch import Tensor

from lit_llama.adapter_files import PEFT_PREFIX, read_adapter_state, write_adapter
from lit_llama.answering import adapter_style, adapter_system
from lit_llama.checkpoint import fingerprint
from lit_llama.command_line import counted, progress
from lit_llama.errors import InputError
from lit_llama.files import atomic_directory, read_json, refuse_overwrite, write_json
from lit_llama.hardware import run_environment
from lit_llama.lora import LINEAR_NAMES, read_adapter_config
from lit_llama.mlp_partition import ROUTED_LORA

Method = Literal[
    "cat", "svd", "linear", "magnitude_prune", "magnitude_prune_svd", "ties", "ties_svd", "dare_linear",
    "dare_linear_svd", "dare_ties", "dare_ties_svd",
]  # fmt: skip


class LowRank(NamedTuple):
    """The update scaling * lora_B @ lora_A of one weight, on the CPU."""

    lora_A: Tensor
    """(r, in), fp32."""
    lora_B: Tensor
    """(out, r), fp32."""
    scaling: float = 1.0


@dataclass(kw_only=True)
class Combination:
    """How several adapters become one."""

    method: Method = "cat"
    """cat: the weighted sum, exactly; its rank is the sum of the ranks. svd: the best approximation of it by a lower
    rank. linear, magnitude_prune, ties, dare_linear, dare_ties: factor by factor, for adapters of equal ranks. The last
    four with _svd: on the updates themselves, which takes long for large models."""
    weights: list[float] | None = None
    """Weight of each adapter, '[0.7, 0.3]'; '[1, -1]' subtracts the second. null: their mean."""
    rank: int | None = None
    """Rank of the result of svd and *_svd. null: the highest of the adapters'."""
    density: float | None = None
    """Share of the entries that magnitude_prune, ties and dare methods keep, above 0 and at most 1."""
    majority_sign: Literal["total", "frequency"] = "total"
    """ties and dare_ties: an entry has the sign of its sum over the adapters, or the one that more of them have."""
    seed: int = 0
    """Of what dare methods keep."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise InputError(f"method {self.method!r} is not one of {', '.join(get_args(Method))}")
        prunes = self.method not in ("cat", "svd", "linear")
        if prunes != (self.density is not None):
            needed = "needs density, 0.5 for instance" if prunes else "keeps every entry: leave density out"
            raise InputError(f"method {self.method} {needed}")
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(f"density {self.density} is not above 0 and at most 1")
        if self.rank is not None and not self.method.endswith("svd"):
            raise InputError(
                f"method {self.method} has the rank that comes out: leave rank out, or choose one with svd"
            )
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank {self.rank} must be at least 1")
        if not all(map(math.isfinite, self.weights or ())):
            raise InputError(f"weights {self.weights} are not all finite")

    def weights_for(self, adapters: int) -> list[float]:
        """A weight for each of so many adapters."""
        weights = [1 / adapters] * adapters if self.weights is None else self.weights
        if len(weights) != adapters:
            raise InputError(f"{len(weights)} weights for {adapters} adapters: give one for each")
        return weights


@dataclass(kw_only=True)
class CompositionArguments(Combination):
    """Combine several LoRA adapters of one base into one adapter directory, which PEFT opens too."""

    adapters: list[Path]
    """Adapter directories of this project or of PEFT, '[out/rivers, out/history]'."""
    out_dir: Path
    """The adapter directory to write."""
    checkpoint_dir: Path | None = None
    """The base. If it is given, adapters of another one are refused and the new adapter names it."""
    overwrite: bool = False
    """Replace what is in out_dir."""


def combine(
    adapters: Mapping[str, Mapping[str, LowRank]],
    combination: Combination,
    count: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, LowRank], dict[str, tuple[float, float]]]:
    """The updates of several adapters, each by layer, -> those of one. A layer that an adapter lacks is zero in it.

    Args:
        adapters: by the names that errors call them by.
        count: is told (layers done, layers in all).

    Returns:
        The combined updates by layer, of scaling 1; and where the method ends with svd, the squared Frobenius norm of
        each (as it is, before its rank was lowered).

    Raises:
        InputError: not one weight an adapter; a layer of different shapes, or, where factors are added, ranks.
    """
    weights = combination.weights_for(len(adapters))
    present = {
        name: {key: adapter[name] for key, adapter in adapters.items() if name in adapter}
        for name in sorted({name for adapter in adapters.values() for name in adapter}, key=_place)
    }
    for name, updates in present.items():
        _refuse_unlike(name, updates, combination.method)
    rank = combination.rank or max(len(update.lora_A) for adapter in adapters.values() for update in adapter.values())
    weight_of = dict(zip(adapters, weights, strict=True))
    generator = torch.Generator().manual_seed(combination.seed)
    combined, norms = {}, {}
    for done, (name, updates) in enumerate(present.items(), start=1):
        shares = [weight_of[key] for key in updates]
        combined[name], squares = _combine_layer(list(updates.values()), shares, combination, rank, generator)
        if squares is not None:
            norms[name] = squares
        count(done, len(present))
    return combined, norms


def _combine_layer(
    updates: list[LowRank], weights: list[float], combination: Combination, rank: int, generator: torch.Generator
) -> tuple[LowRank, tuple[float, float] | None]:
    """One layer of `combine`."""
    method = combination.method
    scales = [weight * update.scaling for update, weight in zip(updates, weights, strict=True)]
    if method in ("cat", "svd"):
        A = torch.cat([scale * update.lora_A for update, scale in zip(updates, scales, strict=True)])
        B = torch.cat([update.lora_B for update in updates], dim=1)
        return (LowRank(A, B), None) if method == "cat" else _truncated(*_svd_of_product(B, A), rank)
    if method.endswith("_svd"):
        dense = [update.lora_B @ update.lora_A * update.scaling for update in updates]
        mixed = _mixed(dense, weights, combination, generator)
        return _truncated(*torch.linalg.svd(mixed, full_matrices=False), rank)
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    A = _mixed([update.lora_A for update in updates], signed, combination, generator)
    B = _mixed([update.lora_B for update in updates], roots, combination, generator)
    return LowRank(A, B), None


def _layer_number(name: str) -> int | None:
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def _place(name: str) -> tuple[float, int]:
    """Order of the layers in the model, lm_head last: what dare methods draw depends on it."""
    number = _layer_number(name)
    return (math.inf, 0) if number is None else (number, LINEAR_NAMES.index(name.rpartition(".")[2]))


def _refuse_unlike(name: str, updates: Mapping[str, LowRank], method: Method) -> None:
    """Raise InputError if a layer has another shape in some of the adapters, or a rank that the method cannot add."""
    (first, expected), *others = updates.items()
    for key, update in others:
        shape, wanted = ((len(u.lora_B), u.lora_A.shape[1]) for u in (update, expected))
        if shape != wanted:
            raise InputError(
                f"{name} is {shape} in {key} and {wanted} in {first}: combine adapters that were made for one base"
            )
        rank, wanted = len(update.lora_A), len(expected.lora_A)
        if rank != wanted and method != "cat" and not method.endswith("svd"):
            raise InputError(
                f"method {method} adds factors of equal ranks, and {name} has rank {rank} in {key}, {wanted} in"
                f" {first}: choose cat, svd or a method that ends with _svd"
            )


def _mixed(tensors: list[Tensor], weights: list[float], combination: Combination, generator: torch.Generator) -> Tensor:
    """Tensors of one shape (m, n) -> one, pruned and added up as the method says."""
    stacked = torch.stack([_pruned(tensor, combination, generator) for tensor in tensors])
    weighted = stacked * torch.tensor(weights)[:, None, None]
    if "ties" not in combination.method:
        return weighted.sum(0)
    votes = stacked if combination.majority_sign == "total" else stacked.sign()
    agrees = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _pruned(tensor: Tensor, combination: Combination, generator: torch.Generator) -> Tensor:
    density = combination.density
    if density is None or density == 1:
        return tensor
    if "dare" in combination.method:
        return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density
    largest = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    return tensor * torch.zeros(tensor.numel()).index_fill(0, largest, 1).view_as(tensor)


def _svd_of_product(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, Vh) of B A (out, r) (r, in), without making it: an SVD of r by r between two orthonormal bases."""
    basis_B, core_B = torch.linalg.qr(B)
    basis_A, core_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(core_B @ core_A.T, full_matrices=False)
    return basis_B @ U, S, Vh @ basis_A.T


def _truncated(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[LowRank, tuple[float, float]]:
    """The best approximation of that rank of U diag(S) Vh, and the squared norms (of it, of the whole)."""
    squares = S.square()
    return LowRank(Vh[:rank], U[:, :rank] * S[:rank]), (float(squares[:rank].sum()), float(squares.sum()))


def read_low_rank(adapter_dir: Path, base_fingerprint: str | None = None) -> tuple[dict[str, LowRank], str | None]:
    """What a LoRA adapter directory adds to each layer, by the layer's name, and the base it was trained on, if known.

    Args:
        base_fingerprint: of the base that it should be (`checkpoint.fingerprint`). None: any.

    Raises:
        InputError: no such adapter, or one that is more than low-rank updates of the base's weights.
    """
    path = adapter_dir / "adapter_model.safetensors"
    config = read_adapter_config(adapter_dir)
    if read_json(adapter_dir / "adapter_config.json").get("peft_type") == ROUTED_LORA:
        raise InputError(f"{adapter_dir} was trained with routed MLPs: only plain LoRA adapters can be combined")
    for has, what in (
        (config.dora, "DoRA, whose updates do not add up"),
        (config.modules_to_save, f"modules_to_save ({', '.join(config.modules_to_save)}), trained as a whole"),
        (config.init != "kaiming", "PiSSA as PEFT keeps it, which is no update of the base: save it as LoRA first"),
    ):
        if has:
            raise InputError(f"{adapter_dir} has {what}: only plain LoRA adapters can be combined")
    state = read_adapter_state(adapter_dir, base_fingerprint)
    state.pop(f"{PEFT_PREFIX}lm_head.base_layer.weight", None)  # PEFT adds it when the head is adapted
    updates = {}
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        stem = key.removesuffix(".lora_A.weight")
        name = stem.removeprefix(PEFT_PREFIX)
        A, B = state.pop(key).float(), state.pop(f"{stem}.lora_B.weight", torch.empty(0, 0)).float()
        if not len(A) == B.shape[1] == config.rank(name) or not config.adapts(name):
            raise InputError(
                f"{path}: {name} has factors {tuple(A.shape)} and {tuple(B.shape)}, which is not what"
                " adapter_config.json says: restore the two files from one copy"
            )
        if not (A.isfinite().all() and B.isfinite().all()):
            raise InputError(f"{path}: {name} holds values that are not finite: leave this adapter out")
        updates[name] = LowRank(A, B, config.scaling(name))
    if state or not updates:
        raise InputError(f"{path}: {next(iter(state), 'no tensor')} is no low-rank update of a layer")
    with safe_open(path, framework="pt") as file:
        return updates, (file.metadata() or {}).get("base_fingerprint")


def write_combined_adapter(arguments: CompositionArguments) -> dict[str, Any]:
    """Combine adapter directories into one, which keeps in report.json and lit_config.yaml what it was made of.

    The prompt style and system message that the adapters were trained with are kept too, where they agree.

    Returns:
        What report.json holds.

    Raises:
        InputError: adapters that cannot be combined, or not by this method; something in `out_dir`. Nothing is written.
    """
    directories, out_dir, base = arguments.adapters, arguments.out_dir, arguments.checkpoint_dir
    refuse_overwrite(out_dir, arguments.overwrite)
    if len({directory.resolve() for directory in directories}) < max(len(directories), 1):
        raise InputError("--adapters is empty or names a directory twice: name each once, with its whole weight")
    if any(directory.resolve().is_relative_to(out_dir.resolve()) for directory in directories):
        raise InputError(f"{out_dir} is or holds one of the adapters to be combined: choose another output")
    weights = arguments.weights_for(len(directories))
    expected = fingerprint(base) if base else None
    adapters, bases = {}, {}
    for directory in directories:
        adapters[str(directory)], bases[str(directory)] = read_low_rank(directory, expected)
    made_for = _common_base(bases) or expected
    with counted("layers combined") as count:
        combined, norms = combine(adapters, arguments, count)
    state, changes = _stored(combined)
    stated = read_json(directories[0] / "adapter_config.json")
    if base:
        stated["base_model_name_or_path"] = str(base)
    configs = [read_adapter_config(directory) for directory in directories]
    if any(config.layers_to_transform is None for config in configs):
        changes["layers_to_transform"] = None
    settings = json.loads(json.dumps(asdict(arguments), default=str)) | {"weights": weights}
    del settings["overwrite"]
    report = {
        "arguments": settings,
        "base_fingerprint": made_for,
        "rank": changes["r"],
        "layers": len(combined),
        **_energy_kept(norms),
        **run_environment(),
    }
    with atomic_directory(out_dir, arguments.overwrite) as temporary:
        write_adapter(temporary, stated | changes, state, made_for)
        write_json(temporary / "report.json", report)
        with open(temporary / "lit_config.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump(settings | _prompt_settings(directories), file, sort_keys=False)
    return report


def _common_base(bases: Mapping[str, str | None]) -> str | None:
    """The fingerprint of the base that all adapters were trained on, as far as they know it."""
    known = [(name, base) for name, base in bases.items() if base is not None]
    for name, base in known[1:]:
        if base != known[0][1]:
            raise InputError(
                f"{name} was trained on another base (fingerprint {base[:12]}) than {known[0][0]} ({known[0][1][:12]}):"
                " only adapters of one base can be combined"
            )
    return known[0][1] if known else None


def _stored(updates: Mapping[str, LowRank]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an adapter directory, and what its adapter_config.json says of them.

    As in PEFT's, every target has one rank in every layer, filled up with zeros, and scaling 1: there are readers of
    such directories that know neither rank_pattern nor alpha_pattern.
    """
    rank = max(len(update.lora_A) for update in updates.values())
    numbers = sorted({_layer_number(name) for name in updates} - {None})
    alike = {
        re.sub(r"(?<=layers\.)\d+", str(number), name): update for name, update in updates.items() for number in numbers
    }
    state = {}
    for name, update in (alike | updates).items():
        lora_A, lora_B, _ = updates.get(name, LowRank(update.lora_A[:0], update.lora_B[:, :0]))
        missing = rank - len(lora_A)
        state[f"{PEFT_PREFIX}{name}.lora_A.weight"] = F.pad(lora_A, (0, 0, 0, missing))
        state[f"{PEFT_PREFIX}{name}.lora_B.weight"] = F.pad(lora_B, (0, missing))
    targets = {name.rpartition(".")[2] for name in updates}
    return state, {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name for name in (*LINEAR_NAMES, "lm_head") if name in targets],
        "layers_to_transform": numbers or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
    }


def _energy_kept(norms: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Shares of the squared Frobenius norm that lowering the rank has kept: in all, and by layer."""
    if not norms:
        return {}
    kept, whole = (sum(side) for side in zip(*norms.values(), strict=True))
    return {
        "energy_kept": kept / whole if whole else 1.0,
        "energy_kept_by_layer": {name: kept / whole if whole else 1.0 for name, (kept, whole) in norms.items()},
    }


def _prompt_settings(directories: Sequence[Path]) -> dict[str, Any]:
    """What lit_config.yaml says of prompts, for generate and evaluate to follow."""
    prompts = {(adapter_style(directory), adapter_system(directory)) for directory in directories} - {(None, None)}
    if len(prompts) > 1:
        progress("note: the adapters were trained with different prompts; none is kept, so name one with --style")
    if len(prompts) != 1:
        return {}
    style, system = prompts.pop()
    return {"eval": {"probe_style": style, "probe_system": system}}
