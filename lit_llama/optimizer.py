"""AdamW with fp32 state whatever the dtype of the weights, and the learning-rate schedule."""

import math

import torch
from torch import Tensor, nn


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over the parameters that require a gradient.

    Parameters that are not fp32 get an fp32 master copy: gradients of micro-batches are summed into it and steps are
    taken on it, so that small updates are not lost to rounding; the model's weights are its rounded image. Weight
    decay applies to matrices only.
    """

    def __init__(self, model: nn.Module, weight_decay: float, betas: tuple[float, float]) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        groups = [
            {"params": [p for p in self.masters.values() if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in self.masters.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, fused=True)

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
    def step(self, learning_rate: float) -> None:
        """One update; gradients are dropped afterwards."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs: parameters (fp32) and moments, by name."""
        tensors = {}
        for name, master in self.masters.items():
            tensors[f"parameter.{name}"] = master.detach()
            for key, value in self.adamw.state[master].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"parameter.{name}"])
            if self.parameters[name] is not master:
                self.parameters[name].copy_(master)
            self.adamw.state[master] = {
                key: tensors[f"{key}.{name}"].to(master.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{name}" in tensors
            }


def learning_rate_at(step: int, total_steps: int, warmup_steps: int, peak: float, final_ratio: float) -> float:
    """Linear warm-up to `peak`, then a cosine down to `peak * final_ratio` at the last of `total_steps` steps."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
