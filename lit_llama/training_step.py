"""One optimizer step: the windows of a global batch onto the device, their loss, its gradients, the update.

When steps are taken, and what is measured between them, is the loop's (`training.py`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lit_llama.data.packing import Batch, TrainingWindows, collate, without_targets
from lit_llama.loss import head_loss
from lit_llama.model import Llama
from lit_llama.optimizer import Optimizer
from lit_llama.parallel import ReadLater, full_tensor, sum_over_processes, to_device

if TYPE_CHECKING:
    from lit_llama.training import TrainConfig


class Auxiliary(Protocol):
    """What a model may have as `auxiliary` to take part in its training; see `lora_tree_routing.LoRATree`."""

    def start_step(self, done: float) -> None:
        """Called before each step with the share of the run that is done."""

    def loss(self) -> Tensor:
        """What the forward pass just made adds to the mean loss of its targets, scalar."""

    def before_update(self) -> None:
        """Called when a step's gradients are there."""


class LossOfBatch(nn.Module):
    """The model and its loss as one forward, which is what data-parallel wrappers need to see."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        document_ids: Tensor,
        targets: Tensor,
        teacher_ids: Tensor,
        teacher_probabilities: Tensor,
    ) -> Tensor:
        """Summed loss of the targets, fp32 scalar; arguments are the fields of `data.packing.Batch`.

        What `model.auxiliary` adds to the mean loss counts by its gradient only: the value stays what an evaluation of
        the same tokens would report.
        """
        hidden = self.model.model(input_ids, position_ids, document_ids)
        teacher = (teacher_ids, teacher_probabilities) if teacher_ids.shape[1] else None
        loss = head_loss(self.model.lm_head, hidden, labels, reduction="sum", targets=targets, teacher=teacher)
        auxiliary: Auxiliary | None = getattr(self.model, "auxiliary", None)
        if auxiliary is None:
            return loss
        added = len(targets) * auxiliary.loss()
        return loss + (added - added.detach())

    def run_inside(self, function: Callable[[], dict]) -> dict:
        """Call a function; under FSDP2 this counts as a forward pass (`parallel.run_inside`)."""
        return function()


class GlobalBatch(NamedTuple):
    """One device's part of the windows of an optimizer step, on that device."""

    micro_batches: list[Batch]
    counts: Tensor
    """fp32 (3,), over all devices: target tokens, input tokens, processes that were told to stop."""


class StepUnderWay(NamedTuple):
    """A step that the device has not necessarily finished."""

    figures: ReadLater
    """Over all devices: summed loss, gradient norm, target tokens, input tokens, processes told to stop."""
    learning_rate: float


def prepare_step(
    fabric: Fabric, windows: TrainingWindows, indices: list[int], config: "TrainConfig", told_to_stop: bool
) -> GlobalBatch:
    """Micro-batches of these windows; all of one shape where layers are compiled, which is done for each shape."""
    own, micro_batch_size = [windows[i] for i in indices], config.micro_batch_size
    # The last step of an epoch may leave a device without a window; it still joins the others' sums.
    missing = 0 if own else 1
    if config.compile:
        missing = -len(own) % micro_batch_size or micro_batch_size * missing
    filled = own + [without_targets(own[0] if own else windows[0])] * missing
    batches = [collate(filled[i : i + micro_batch_size]) for i in range(0, len(filled), micro_batch_size)]
    targets = sum(len(batch.targets) for batch in batches)
    counts = torch.tensor([targets, sum(len(window.input_ids) for window in own), told_to_stop], dtype=torch.float32)
    return GlobalBatch(
        [Batch(*(to_device(tensor, fabric.device) for tensor in batch)) for batch in batches],
        sum_over_processes(to_device(counts, fabric.device), fabric.world_size),
    )


def take_step(
    fabric: Fabric,
    step_module: nn.Module,
    optimizer: Optimizer,
    batch: GlobalBatch,
    learning_rate: float,
    gradient_clip: float,
    failed: Tensor,
    auxiliary: Auxiliary | None,
    done: float,
) -> StepUnderWay:
    """Hand one optimizer step to the device, micro-batch by micro-batch, and wait for nothing.

    The loss is the mean over target tokens of the whole global batch on all devices, not a mean of means: each
    micro-batch adds its sum divided by that global count.

    Args:
        failed: fp32 scalar on the device, set to 1 when loss or gradients are not finite. From then on no step changes
            parameters or moments: the loop learns of it one step late.
        done: share of the run's steps before this one.
    """
    if auxiliary is not None:
        auxiliary.start_step(done)
    # Data-parallel wrappers average gradients over devices; the sum is wanted.
    scale = fabric.world_size / batch.counts[0].clamp(min=1)
    total = torch.zeros((), device=fabric.device)
    for number, micro_batch in enumerate(batch.micro_batches):
        # Masters collect after every micro-batch, so there each one must be summed over the devices by itself.
        accumulating = number < len(batch.micro_batches) - 1 and not optimizer.has_masters
        with fabric.no_backward_sync(step_module, enabled=accumulating and fabric.world_size > 1):
            loss = step_module(*micro_batch)
            fabric.backward(loss * scale)
        optimizer.collect_gradients()
        total += loss.detach()
    total = sum_over_processes(total, fabric.world_size)
    if auxiliary is not None:
        auxiliary.before_update()
    gradient_norm = full_tensor(optimizer.clip_gradients(gradient_clip))
    failed.clamp_(min=(~(total.isfinite() & gradient_norm.isfinite())).to(failed.dtype))
    optimizer.step(learning_rate, skip=failed)
    return StepUnderWay(ReadLater(torch.cat((torch.stack((total, gradient_norm)), batch.counts))), learning_rate)
