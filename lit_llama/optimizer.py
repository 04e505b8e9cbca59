"""AdamW with its state in 32 or 8 bits, whatever the dtype of the weights, and the learning-rate schedule."""

import logging
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_llama.command_line import progress
from lit_llama.errors import InputError

OptimizerName = Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]
"""AdamW with fp32 moments, or in blocks of 256 quantized to 8 bits (Dettmers et al. 2022, arXiv 2110.02861; tensors of
under 4,096 elements stay fp32); paged: in memory that the CUDA driver moves to the CPU's when the card's is short."""


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over the parameters that require a gradient.

    Parameters that are not fp32 get an fp32 master copy: gradients of micro-batches are summed into it and steps are
    taken on it, so that small updates are not lost to rounding; the model's weights are its rounded image. Weight
    decay applies to matrices only, and not to those of routers.

    Args:
        kind: see `OptimizerName`. Paging needs CUDA; elsewhere the same precision is used without it, and a line says
            so.
        learning_rate_factors: by parameter name, the share of the learning rate at which it learns; by default all.

    Raises:
        InputError: bitsandbytes is needed and not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        weight_decay: float,
        betas: tuple[float, float],
        kind: OptimizerName = "adamw",
        learning_rate_factors: dict[str, float] | None = None,
    ) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            factor = (learning_rate_factors or {}).get(name, 1.0)
            # A router drawn to zero would no longer decide (`lora_tree_routing.py`).
            decay = weight_decay if master.ndim > 1 and ".lora_router." not in name else 0.0
            groups.setdefault((decay, factor), []).append(master)
        self._factors = [factor for _, factor in groups]
        self.adamw = _adamw(
            [{"params": masters, "weight_decay": decay} for (decay, _), masters in groups.items()], betas, kind
        )

    @property
    def has_masters(self) -> bool:
        """Whether gradients must be collected after every micro-batch (`collect_gradients`)."""
        return any(self.masters[name] is not p for name, p in self.parameters.items())

    def collect_gradients(self) -> None:
        """Add the gradients of a micro-batch to the masters'; nothing to do for fp32 parameters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                master.grad += parameter.grad
                parameter.grad = None

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients to a joint norm of at most `max_norm` (0: leave them); returns the norm before."""
        return nn.utils.clip_grad_norm_(list(self.masters.values()), max_norm or math.inf)

    @torch.no_grad()
    def step(self, learning_rate: float, skip: Tensor | None = None) -> None:
        """One update, each parameter at its share of the learning rate; gradients are dropped afterwards.

        Args:
            skip: fp32 scalar on the parameters' device; where it is 1, parameters and moments stay as they are. AdamW
                leaves that to the device; bitsandbytes cannot, and waits for the value.
        """
        for group, factor in zip(self.adamw.param_groups, self._factors, strict=True):
            group["lr"] = learning_rate * factor
        if isinstance(self.adamw, torch.optim.AdamW):
            self.adamw.found_inf = skip
            self.adamw.step()
        elif skip is None or not skip.item():
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs: parameters (fp32) and moments as they are kept, by name."""
        tensors = {}
        for name, master in self.masters.items():
            tensors[f"parameter.{name}"] = master.detach()
            for key, value in self.adamw.state[master].items():
                if not key.startswith("qmap"):  # the 256 levels of 8-bit states, the same always
                    tensors[f"{key}.{name}"] = torch.as_tensor(value)
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave."""
        groups = self.adamw.param_groups
        places = {id(p): (i, j) for i, group in enumerate(groups) for j, p in enumerate(group["params"])}
        for name, master in self.masters.items():
            master.copy_(tensors[f"parameter.{name}"])
            if self.parameters[name] is not master:
                self.parameters[name].copy_(master)
            if f"step.{name}" not in tensors:
                self.adamw.state.pop(master, None)
            elif isinstance(self.adamw, torch.optim.AdamW):
                self.adamw.state[master] = {
                    key: tensors[f"{key}.{name}"].to(master.device) for key in ("step", "exp_avg", "exp_avg_sq")
                }
            else:  # bitsandbytes counts steps in a Python number and sets its (perhaps paged) memory aside itself
                group, place = places[id(master)]
                self.adamw.init_state(groups[group], master, group, place)
                state = self.adamw.state[master]
                for key, value in state.items():
                    if isinstance(value, Tensor) and not key.startswith("qmap"):
                        value.copy_(tensors[f"{key}.{name}"])
                state["step"] = int(tensors[f"step.{name}"])


def _adamw(groups: list[dict], betas: tuple[float, float], kind: OptimizerName) -> torch.optim.Optimizer:
    device = groups[0]["params"][0].device
    if kind.startswith("paged-") and device.type != "cuda":
        kind = kind.removeprefix("paged-")
        progress(f"note: optimizer states cannot be paged on {device.type}: train.optimizer is {kind} here")
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    if isinstance(groups[0]["params"][0], DTensor):
        raise InputError(f"train.optimizer {kind} cannot be sharded: use adamw with --strategy fsdp")
    # On import it warns that a package of extra kernels is missing, which would fetch code from a hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim import AdamW
    except ImportError:
        raise InputError(
            f"train.optimizer {kind} needs the package bitsandbytes: pip install bitsandbytes, or use adamw"
        ) from None
    bits, paged = 8 if kind.endswith("8bit") else 32, kind.startswith("paged-")
    return AdamW(groups, lr=0.0, betas=betas, optim_bits=bits, is_paged=paged)


def learning_rate_at(step: int, total_steps: int, warmup_steps: int, peak: float, final_ratio: float) -> float:
    """Linear warm-up to `peak`, then a cosine down to `peak * final_ratio` at the last of `total_steps` steps."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
