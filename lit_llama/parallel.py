"""Several processes and one asynchronous device: slices of a model, sums over processes, values read without waiting.

Under FSDP2 (`torch.distributed.fsdp.fully_shard`, Zhao et al. 2023, arXiv 2304.11277) every process holds a slice of
each parameter as a DTensor; a decoder layer is whole only while it computes. Which strategy runs is Fabric's business
(`training.start_fabric`); when to step, measure and save is the loop's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_llama.model import DecoderLayer
from lit_llama.quantization import QuantizedLinear


def sharded_strategy(world_size: int) -> ModelParallelStrategy:
    """FSDP2 over all processes, on CUDA and CPU."""
    return ModelParallelStrategy(_shard, data_parallel_size=world_size, tensor_parallel_size=1)


def _shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Slice every decoder layer by itself and the rest with the root, in place.

    Packed codes of quantized layers, which are buffers and would stay whole on every device, are sliced too. Gradients
    are summed in fp32 whatever the parameters are.
    """
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            codes = layer.codes
            del layer.codes
            layer.codes = nn.Parameter(codes, requires_grad=False)
    options = {"mesh": mesh["data_parallel"], "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    for layer in module.modules():
        if isinstance(layer, DecoderLayer):
            fully_shard(layer, **options)
    fully_shard(module, **options)
    register_fsdp_forward_method(module, "run_inside")
    return module


def run_inside(module: nn.Module, function: Callable[[], dict]) -> dict:
    """Call a function that uses parts of a sharded module; `module.run_inside` calls it as a forward pass.

    Meanwhile what belongs to no decoder layer is whole, and afterwards sliced again.
    """
    result = module.run_inside(function)
    if isinstance(module, FSDPModule):
        module.reshard()
    return result


def loading_device(fabric: Fabric, quantize: str | None = None) -> torch.device:
    """Where to load a model.

    One that will be sharded goes from mapped files, which the processes of a machine share, to the devices layer by
    layer. Quantized weights are packed on the device, where that is fast; there each device holds all for a moment.
    """
    sharded = isinstance(fabric.strategy, ModelParallelStrategy)
    return torch.device("cpu") if sharded and quantize is None else fabric.device


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor whole; all processes must take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sliced_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same in every process, sliced as `parameter` is; one of another shape stays whole."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    tensor = tensor.to(parameter.to_local().device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


@contextmanager
def whole_parameters(model: nn.Module, keep: bool) -> Iterator[None]:
    """Put whole tensors on the CPU in the place of sliced trainable parameters for a while; all processes take part.

    Args:
        keep: false where a process only helps to gather and needs nothing itself.
    """
    whole: dict[Tensor, nn.Parameter | None] = {}
    replaced = []
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not (isinstance(parameter, DTensor) and parameter.requires_grad):
                continue
            if parameter not in whole:  # tied parameters are one
                gathered = parameter.detach().full_tensor()
                whole[parameter] = nn.Parameter(gathered.cpu(), requires_grad=True) if keep else None
            if keep:
                replaced.append((module, name, parameter))
                setattr(module, name, whole[parameter])
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            setattr(module, name, parameter)


def sum_over_processes(tensor: Tensor, world_size: int) -> Tensor:
    """The sum of a tensor over all processes, in place.

    Not by Fabric, whose reduction begins with a barrier and so waits for the device.
    """
    if world_size > 1:
        torch.distributed.all_reduce(tensor, op=ReduceOp.SUM)
    return tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on its way to the device: from page-locked memory a CUDA card fetches it beside its other work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class ReadLater:
    """A tensor's values, copied to the host when the device has computed them and read without waiting for more."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list[float]:
        """The values; waits until the device has come so far."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()
