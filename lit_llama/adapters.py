"""A bank of named LoRA adapters on one base: switched without reloading, each row of a batch with its own, none merged.

    bank = AdapterBank(model)
    bank.load("law", "out/law"), bank.load("tax", "out/tax")
    bank.select("law")                  every row, until something else is selected
    bank.select(["law", None, "tax"])   a batch of three; None is the base
    generate(model, prompts, ...)       as ever

A linear layer that any adapter of the bank adapts is wrapped once (`BankedLinear`). A hook in front of the model looks
up which rows take which adapter and lays out their factors for all layers: the factors of one adapter as they are, or
those of several below each other, where the kernels of adapter trees find each row's (`lora_tree_linear.py`). A
generation goes on with the adapters that it began with: its cache remembers them row by row.

For inference only: nothing here is trained, and nothing is merged. Combining adapters into one is
`adapter_composition.py`, choosing one by the question `adapter_routing.py`, the files `adapter_files.py`.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.adapter_files import PEFT_PREFIX, fill_parameters, read_adapter_state
from lit_llama.command_line import progress
from lit_llama.errors import InputError
from lit_llama.files import atomic_directory, read_json
from lit_llama.kv_cache import KVCache
from lit_llama.lora import LINEAR_NAMES, LoRAConfig, read_adapter_config
from lit_llama.lora_tree_linear import Kernel, add_leaf_update_
from lit_llama.lora_tree_routing import Leaves
from lit_llama.model import Llama

Factors = dict[str, tuple[Tensor, Tensor, float]]
"""By the name of a linear layer: lora_A (r, in), lora_B (out, r) and the scaling of their product."""

_BASE = -1
"""Number of no adapter."""
_ROW_STATE = "adapter"
"""Under which name a cache remembers the number of each row's adapter."""
_REMOVED = "an adapter of the generation under way was removed from the bank: begin it again"


@dataclass
class _Adapter:
    directory: Path
    stamp: tuple[int, ...]
    """Of its files when it was loaded; see `_stamp`."""
    config: LoRAConfig
    ranks: dict[str, int]
    """Of each linear layer that it adapts, by name."""
    num_bytes: int
    """Of its factors on the device."""
    factors: Factors | None = None
    """On the device or, evicted, in the host's memory; None: only in its directory."""
    on_device: bool = False
    last_used: int = -1


@dataclass(frozen=True)
class _Stack:
    """The factors of several adapters below each other, filled up with zeros to a common rank in each layer."""

    members: list[int]
    """Numbers of the adapters; the base is an adapter of zeros."""
    factors: Factors
    num_bytes: int


@dataclass(frozen=True)
class _Pass:
    """What the linear layers need to know of a forward pass."""

    rows: list[int]
    """Number of the adapter of each row of the batch."""
    length: int
    factors: Factors
    leaves: Leaves | None = None
    """Which member of a stack each token takes; None: `factors` are those of one adapter."""
    kernel: Kernel | None = None


_NO_PASS = _Pass([], 0, {})


class BankedLinear(nn.Module):
    """A frozen linear layer, perhaps quantized, with whatever update the bank has for it in the pass under way."""

    def __init__(self, name: str, linear: nn.Module, bank: "AdapterBank") -> None:
        super().__init__()
        self.base_layer = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._name, self._bank = name, bank

    def forward(self, x: Tensor) -> Tensor:
        output, current = self.base_layer(x), self._bank.current_pass
        if (update := current.factors.get(self._name)) is None:
            return output
        (A, B, scaling), rows, updated = update, x.flatten(0, -2), output.view(-1, self.out_features)
        if current.leaves is None:
            updated.addmm_(rows @ A.T, B.T, alpha=scaling)
        else:
            add_leaf_update_(updated, rows, A, B, current.leaves, scaling, current.kernel)
        return output


class AdapterBank:
    """Several named LoRA adapters on one base, none merged; each row of a batch may take another.

    Factors are served in the model's dtype, as a LoRA layer does; with one adapter for all rows, the logits are to the
    bit those of `load_adapter` on the same base.

    Args:
        model: a base, quantized or not, without an adapter. It becomes `model.adapter_bank`.
        memory_limit: most bytes that adapters may take on the model's device, those of a batch with several adapters
            twice (once in the layout for the batch). Above it, the adapters that were not used for longest give way:
            to the host's memory, or on a CPU to their directories, from which they are read again. None: no limit.

    Raises:
        InputError: the model carries an adapter or a bank already, or routes its MLPs.
    """

    def __init__(self, model: Llama, memory_limit: int | None = None) -> None:
        taken = ("lora_config", "prompt_tuning_config", "lora_tree", "adapter_bank", "mlp_routing")
        if any(getattr(model, name, None) is not None for name in taken):
            raise InputError("a bank of adapters needs a base without an adapter, another bank or routed MLPs")
        self.model, self.memory_limit = model, memory_limit
        self.current_pass = _NO_PASS
        """Of the model, for `BankedLinear`."""
        self._linears = {
            name: (module.in_features, module.out_features)
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in LINEAR_NAMES
        }
        self._numbers: dict[str, int] = {}
        self._adapters: dict[int, _Adapter] = {}
        self._selected: int | list[int] = _BASE
        self._stack: _Stack | None = None
        self._counter = count()  # of adapters and of their uses
        self._told = False
        model.model.register_forward_pre_hook(self.begin_pass, with_kwargs=True)
        model.adapter_bank = self

    # --- what is in the bank

    @property
    def names(self) -> list[str]:
        """Of the adapters, in the order of loading."""
        return list(self._numbers)

    def load(self, name: str, adapter_dir: Path | str) -> None:
        """Add the LoRA adapter of a PEFT directory under a name of its own.

        Raises:
            InputError: the name is taken; no adapter there or a damaged one, one of another base or of a kind that
                no bank holds; or it does not fit into the memory limit alone. The bank stays as it was.
        """
        if name in self._numbers:
            raise InputError(f"an adapter called {name!r} is in the bank already: remove it or choose another name")
        directory = Path(adapter_dir)
        config = _bankable_config(directory)
        ranks = {linear: config.rank(linear) for linear in self._linears if config.adapts(linear)}
        itemsize = self.model.model.norm.weight.itemsize
        num_bytes = sum(rank * sum(self._linears[linear]) for linear, rank in ranks.items()) * itemsize
        adapter = _Adapter(directory, _stamp(directory), config, ranks, num_bytes)
        number = next(self._counter)
        self._numbers[name], self._adapters[number] = number, adapter
        try:
            self._admit([number])
        except BaseException:
            del self._numbers[name], self._adapters[number]
            raise
        for linear in ranks:
            parent, _, child = linear.rpartition(".")
            block = self.model.get_submodule(parent)
            if not isinstance(getattr(block, child), BankedLinear):
                setattr(block, child, BankedLinear(linear, getattr(block, child), self))
        self.model.decoder = None  # one that was made before passes by the layers

    def save(self, name: str, adapter_dir: Path | str, overwrite: bool = False) -> None:
        """Write an adapter into a directory of its own, as it was loaded, with the settings of its run if it has them.

        Raises:
            InputError: no such adapter, one whose own directory has changed, or something in `adapter_dir` already.
        """
        source = self._unchanged(self._number(name)).directory
        with atomic_directory(adapter_dir, overwrite) as directory:
            for file in ("adapter_config.json", "adapter_model.safetensors", "lit_config.yaml"):
                if (source / file).is_file():
                    shutil.copyfile(source / file, directory / file)

    def remove(self, name: str) -> None:
        """Take an adapter out of the bank and free its memory.

        Raises:
            InputError: no such adapter, or it is selected.
        """
        number = self._number(name)
        if number in (self._selected if isinstance(self._selected, list) else [self._selected]):
            raise InputError(f"adapter {name!r} is selected: select another one, or None, before it is removed")
        self.current_pass = _NO_PASS
        if self._stack is not None and number in self._stack.members:
            self._stack = None
        self.model.decoder = None  # which knows it; see `prepare_to_generate`
        del self._numbers[name], self._adapters[number]

    def rows_of(self, cache: KVCache) -> list[int]:
        """Place in `names` of each row's adapter in a generation under way, -1 for the base.

        Raises:
            InputError: one was removed.
        """
        places = {_BASE: -1} | {number: place for place, number in enumerate(self._numbers.values())}
        rows = cache.row_state[_ROW_STATE].tolist()
        if not places.keys() >= set(rows):
            raise InputError(_REMOVED)
        return [places[number] for number in rows]

    def low_rank(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """By the name of each adapted linear layer: lora_A (r, in) and scaling * lora_B (out, r).

        Both fp32 on the CPU and new for every call; read from the adapter's directory, whatever the model's dtype.
        """
        factors = self._read(self._number(name), torch.float32, torch.device("cpu"))
        return {linear: (A, scaling * B) for linear, (A, B, scaling) in factors.items()}

    # --- who takes what

    def select(self, adapter: str | None | Sequence[str | None]) -> None:
        """Choose the adapter of all rows, or of each row of the batches to come; None is the base.

        A list of one counts for all rows. A generation under way goes on with the adapters that it began with.

        Raises:
            InputError: no adapter of that name, an empty list, or adapters that together exceed the memory limit. What
                was selected before then stays.
        """
        if adapter is None or isinstance(adapter, str):
            selected: int | list[int] = self._number(adapter)
        elif len(adapter) == 0:
            raise InputError("select: an empty list chooses no adapter for any row; None is the base")
        else:
            selected = [self._number(name) for name in adapter]
            selected = selected[0] if len(selected) == 1 else selected
        self._admit(sorted(set(selected)) if isinstance(selected, list) else [selected])
        self._selected = selected

    @contextmanager
    def using(self, adapter: str | None | Sequence[str | None]) -> Iterator[None]:
        """Select for a while; afterwards what was selected before is selected again."""
        before = self._selected
        self.select(adapter)
        try:
            yield
        finally:
            self._selected = before

    def _number(self, name: str | None) -> int:
        if name is None:
            return _BASE
        if name not in self._numbers:
            raise InputError(f"no adapter is called {name!r}; the bank holds {', '.join(self._numbers) or 'none'}")
        return self._numbers[name]

    def begin_pass(self, module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        """Hook in front of `LlamaModel.forward`, of its arguments: what its linear layers will ask for."""
        given = dict(zip(("input_ids", "position_ids", "document_ids", "cache"), arguments, strict=False)) | keywords
        (batch, length), cache, device = given["input_ids"].shape, given.get("cache"), given["input_ids"].device
        if cache is not None and _ROW_STATE in cache.row_state:
            rows = cache.row_state[_ROW_STATE].tolist()  # waits for the device, once a pass
        else:
            rows = self._selected if isinstance(self._selected, list) else [self._selected] * batch
            if len(rows) != batch:
                raise InputError(
                    f"{len(rows)} adapters are selected, one a row, and the batch has {batch} rows: select as many as"
                    " there are prompts, or one for all"
                )
            if cache is not None:
                cache.row_state[_ROW_STATE] = torch.tensor(rows, device=device)
        if self.current_pass.rows == rows and self.current_pass.length == length:
            return
        used = sorted(set(rows))
        if not self._adapters.keys() >= set(used) - {_BASE}:
            raise InputError(_REMOVED)
        self._admit(used)
        if len(used) == 1:
            factors = {} if used == [_BASE] else self._adapters[used[0]].factors
            self.current_pass = _Pass(rows, length, factors)
            return
        members = self._stack.members
        index = torch.tensor([members.index(number) for number in rows], device=device).repeat_interleave(length)
        # Token by token, reading the stack is what takes time, and nearly all of its members are somebody's.
        kernel: Kernel | None = "mask" if length == 1 else None
        self.current_pass = _Pass(rows, length, self._stack.factors, Leaves(index, len(members)), kernel)

    # --- what is where

    @torch.inference_mode(False)  # factors outlive the generation that first needs them
    def _admit(self, used: list[int]) -> None:
        """Bring the factors of these adapters to the device, stacked where there are several; others give way.

        Raises:
            InputError: they exceed the memory limit, or one cannot be read from its directory any more.
        """
        chosen = {number: self._adapters[number] for number in used if number != _BASE}
        for adapter in chosen.values():
            adapter.last_used = next(self._counter)
        stacked, idle_stack = 0, 0 if self._stack is None else self._stack.num_bytes
        if len(used) > 1:
            fits = self._stack is not None and set(used) <= set(self._stack.members)
            stacked, idle_stack = (idle_stack, 0) if fits else (self._stack_bytes(used), idle_stack)
        needed = stacked + sum(adapter.num_bytes for adapter in chosen.values())
        limit = float("inf") if self.memory_limit is None else self.memory_limit
        if needed > limit:
            names = ", ".join(name for name, number in self._numbers.items() if number in chosen)
            together = ", with their layout for a batch," if stacked else ""
            raise InputError(
                f"{names}: {needed:,} bytes on the device{together} are above the memory limit of {limit:,}: raise it,"
                " or use fewer at a time"
            )
        others = [adapter for number, adapter in self._adapters.items() if adapter.on_device and number not in chosen]
        others.sort(key=lambda adapter: adapter.last_used, reverse=True)
        held = needed + sum(adapter.num_bytes for adapter in others)
        if idle_stack and (stacked or held + idle_stack > limit):
            self._stack, self.current_pass = None, _NO_PASS
        while held > limit:
            held -= others[-1].num_bytes
            self._evict(others.pop())
        weight = self.model.model.norm.weight
        for number, adapter in chosen.items():
            if not adapter.on_device:
                factors = adapter.factors or self._read(number, weight.dtype, weight.device)
                adapter.factors, adapter.on_device = _moved(factors, weight.device), True
        if stacked and self._stack is None:
            self._stack = _Stack(used, self._stacked_factors(used), stacked)

    def _evict(self, adapter: _Adapter) -> None:
        on_cpu = self.model.model.norm.weight.device.type == "cpu"
        adapter.factors, adapter.on_device = None if on_cpu else _moved(adapter.factors, torch.device("cpu")), False
        self.current_pass = _NO_PASS
        if not self._told:
            self._told = True
            place = "their directories" if on_cpu else "the host's memory"
            progress(
                f"adapters above the memory limit of {self.memory_limit:,} bytes: those not used for longest wait in"
                f" {place} until they are used again"
            )

    def _stack_bytes(self, members: list[int]) -> int:
        """Size of a stack of these adapters."""
        ranks: dict[str, int] = {}
        for number in set(members) - {_BASE}:
            for linear, rank in self._adapters[number].ranks.items():
                ranks[linear] = max(rank, ranks.get(linear, 0))
        features = sum(rank * sum(self._linears[linear]) for linear, rank in ranks.items())
        return features * len(members) * self.model.model.norm.weight.itemsize

    def _stacked_factors(self, members: list[int]) -> Factors:
        factors = [{} if number == _BASE else self._adapters[number].factors for number in members]
        linears = dict.fromkeys(linear for member in factors for linear in member)
        return {linear: _stacked([member.get(linear) for member in factors]) for linear in linears}

    def _read(self, number: int, dtype: torch.dtype, device: torch.device) -> Factors:
        """The factors of an adapter from its directory."""
        adapter = self._unchanged(number)
        parameters: dict[str, nn.Parameter] = {}
        for linear, rank in adapter.ranks.items():
            in_features, out_features = self._linears[linear]
            for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                empty = torch.empty(shape, dtype=dtype, device=device)
                parameters[f"{PEFT_PREFIX}{linear}.lora_{side}.weight"] = nn.Parameter(empty, requires_grad=False)
        fill_parameters(parameters, read_adapter_state(adapter.directory, self.model.fingerprint), adapter.directory)
        filled = iter(parameters.values())
        return {
            linear: (next(filled).detach(), next(filled).detach(), adapter.config.scaling(linear))
            for linear in adapter.ranks
        }

    def _unchanged(self, number: int) -> _Adapter:
        """The adapter, whose directory still holds what was loaded from it."""
        adapter = self._adapters[number]
        if _stamp(adapter.directory) != adapter.stamp:
            raise InputError(
                f"{adapter.directory} has changed since it was loaded: remove it from the bank, load it again"
            )
        return adapter


def load_directory(
    model: Llama, adapters_dir: Path | str, memory_limit: int | None = None
) -> tuple[AdapterBank, dict[str, str]]:
    """A bank of all adapters in the subfolders of a folder, under the names of these, in alphabetical order.

    Returns:
        (the bank, one line for each subfolder that could not be loaded: its name -> why).

    Raises:
        InputError: no such folder, or no adapter in it that could be loaded.
    """
    adapters_dir = Path(adapters_dir)
    if not adapters_dir.is_dir():
        raise InputError(f"{adapters_dir}: no such folder of adapters")
    bank, errors = AdapterBank(model, memory_limit), {}
    for directory in sorted(item for item in adapters_dir.iterdir() if item.is_dir() and item.name[0] != "."):
        try:
            bank.load(directory.name, directory)
        except (InputError, OSError) as error:
            errors[directory.name] = " ".join(str(error).split())
    if not bank.names:
        why = next(iter(errors.values()), "it has no subfolders")
        raise InputError(f"{adapters_dir}: no adapter could be loaded from it: {why}")
    return bank, errors


def _bankable_config(directory: Path) -> LoRAConfig:
    """Of an adapter whose update of each linear layer is of low rank, and which changes nothing else."""
    path = directory / "adapter_config.json"
    try:
        kind = read_json(path).get("peft_type")
        config = read_adapter_config(directory) if kind == "LORA" else None
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the description of a LoRA adapter ({error})") from None
    if config is None:
        why = f"its peft_type is {kind!r}, not LORA"
    elif config.dora:
        why = "DoRA also scales what the base computes"
    elif config.modules_to_save:
        why = f"it brings weights of its own for {' and '.join(config.modules_to_save)}"
    elif "lm_head" in config.targets:
        why = "it adapts lm_head, which is applied apart from the layers of a pass"
    elif config.init != "kaiming":
        why = "PiSSA is not converted in it; load_adapter and save_adapter make an ordinary adapter of it"
    else:
        return config
    raise InputError(f"{directory} cannot be in a bank: {why}")


def _stamp(directory: Path) -> tuple[int, ...]:
    """What changes when one of the two files of an adapter is replaced."""
    paths = [directory / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    try:
        return tuple(number for path in paths for number in (path.stat().st_mtime_ns, path.stat().st_size))
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None


def _moved(factors: Factors, device: torch.device) -> Factors:
    return {name: (A.to(device), B.to(device), scaling) for name, (A, B, scaling) in factors.items()}


def _stacked(members: list[tuple[Tensor, Tensor, float] | None]) -> tuple[Tensor, Tensor, float]:
    """A (members * r, in), B (out, members * r) and scaling of all, with r the highest rank and zeros below it."""
    present = [member for member in members if member is not None]
    rank = max(len(A) for A, _, _ in present)
    scalings = {scaling for _, _, scaling in present}
    A, B, shared = present[0] if len(scalings) == 1 else (*present[0][:2], 1.0)
    nothing = (A.new_zeros(0, A.shape[1]), B.new_zeros(len(B), 0), shared)
    filled = []
    for A, B, scaling in (member or nothing for member in members):
        missing = rank - len(A)
        B = B if scaling == shared else B * scaling
        filled.append((F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))) if missing else (A, B))
    return torch.cat([A for A, _ in filled]), torch.cat([B for _, B in filled], dim=1), shared
