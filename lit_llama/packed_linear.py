"""Linear layers laid out for generating text on a CPU.

A product of few rows with a bf16 weight is done when the weight has been read, but oneDNN reads one that lies row by
row at half of what the memory gives. Repacked into the library's own blocks it is read about twice as fast, to the
same bits. `pack_linear_layers` does that once, for a model that is only going to generate. Not here: quantized layers,
which have layouts of their own (`quantization.py`).
"""

import torch
from torch import Tensor, nn

from lit_llama.lora_linear import LoRALinear, updated_row_norms
from lit_llama.mlp_partition import partitioned_mlps
from lit_llama.model import Llama


class PackedLinear(nn.Module):
    """A frozen bf16 linear layer without bias, with or without its LoRA update; for inference only.

    lora_A lies below the weight as further rows, so that it costs no product of its own.
    """

    def __init__(self, weight: Tensor, lora: LoRALinear | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.lora_B: Tensor | None = None  # (r, out)
        self.row_scale: Tensor | None = None  # (out,), DoRA's
        if lora is not None:
            lora_A, lora_B = (factor.detach() for factor in lora.factors())
            if lora.lora_magnitude_vector is not None:
                norms = updated_row_norms(weight.detach(), lora_A, lora_B, lora.scaling)
                self.row_scale = (lora.lora_magnitude_vector.detach() / norms).to(weight.dtype)
            weight = torch.cat((weight, lora_A.to(weight.dtype)))
            self.lora_B = lora_B.to(weight.dtype).T
            self.scaling = lora.scaling
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        output = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        if self.lora_B is None:
            return output
        output, low = output.flatten(0, -2).split((self.out_features, len(self.lora_B)), dim=-1)
        output = torch.addmm(output, low, self.lora_B, alpha=self.scaling).view(*x.shape[:-1], -1)
        return output if self.row_scale is None else output.mul_(self.row_scale)


def pack_linear_layers(model: Llama) -> None:
    """Replace the model's linear layers and those under LoRA by `PackedLinear`, in place, where that is of use.

    Of use is it for bf16 on a CPU with instructions for it; any other model stays as it is. Afterwards the model can
    only generate. The packed weights are a copy; pages of a checkpoint's file are the operating system's to take back.
    """
    weight = model.model.norm.weight
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not supported:
        return
    by_expert: set[nn.Module] = set()
    for mlp in partitioned_mlps(model):
        if mlp.path == "blocks" and mlp.blocks_readable():
            mlp.packed = [[PackedLinear(w) for w in mlp.blocks(i, i + 1)] for i in range(mlp.n_experts)]
            by_expert.update(mlp.modules())
        elif isinstance(getattr(mlp.gate_proj, "linear", mlp.gate_proj), nn.Linear):
            mlp.gate_means = mlp.score_weight()  # of the update too, which is packed next
    for name, module in list(model.named_modules()):
        if module in by_expert:
            continue
        parent_name, _, child = name.rpartition(".")
        if isinstance(module, LoRALinear) and isinstance(module.linear, nn.Linear):
            packed = PackedLinear(module.linear.weight, module)
        elif isinstance(module, nn.Linear) and child != "linear":  # that of a LoRALinear is packed with it
            packed = PackedLinear(module.weight)
        else:
            continue
        setattr(model.get_submodule(parent_name), child, packed)
