"""Steps of generation as one compiled function, which on CUDA is replayed as one graph.

A step runs hundreds of kernels that are done sooner than the next is launched. `torch.compile` makes fewer of them, a
CUDA graph launches them all at once. Shapes that change while text is generated (rows, tokens a step, memory of the
cache) are symbols of the compiled function, so that it is compiled once for one row and once for more; a graph, which
takes milliseconds, is recorded for each. PyTorch keeps what it compiled for later runs (TORCHINDUCTOR_CACHE_DIR).
Prompts go through the model as it is. CPUs have `cpu_decode.py`.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_llama.command_line import progress
from lit_llama.kv_cache import KVCache, StepCache
from lit_llama.lora import lora_layers, merge_lora
from lit_llama.model import Llama
from lit_llama.quantization import HostEmbedding

MOST_GRAPHS = 32
"""Recorded at a time: rows come and go, and memory grows. Each keeps the activations of a step."""


class CompiledDecoder:
    """Computes steps of generation in place of the model's own forward pass; made by `compiled_decoder`."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        cuda = model.model.norm.weight.device.type == "cuda"

        def compute(tokens: Tensor, positions: Tensor, memory: list[list[Tensor]], cache: KVCache) -> Tensor:
            return model.lm_head(model.model(tokens, cache=StepCache(cache, memory, positions)))

        # The option lets products with a single row read quantized weights as they are stored.
        options = {"coordinate_descent_tuning": True} if cuda else None
        self._compute = torch.compile(compute, dynamic=False, options=options)
        self._graphs: OrderedDict[tuple, _Graph] | None = OrderedDict() if cuda else None

    def read(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read (rows, length) int64 ids into the cache; returns the last's normalised hidden states (rows, hidden)."""
        return self.model.model(tokens, cache=cache)[:, -1]

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits (rows, length, vocab) after each of some tokens (rows, length) int64, which the cache then holds.

        They are overwritten by those of a later step.
        """
        cache.prepare(tokens.shape[1])
        if cache.first is not None:  # several tokens behind a window that rolled, which see keys in order
            return self.model.lm_head(self.model.model(tokens, cache=cache))
        positions = cache.positions.expand(len(tokens), -1).contiguous()
        memory = [cache.keys, cache.values, cache.key_scales, cache.value_scales]
        _mark_symbols(tokens, positions, cache)
        if self._graphs is None:
            logits = self._compute(tokens, positions, memory, cache)
        else:
            # A later cache may lie where one lay, in another shape.
            key = (tokens.shape, cache.keys[0].shape, *(tensor.data_ptr() for tensor in cache.tensors()))
            if key not in self._graphs:
                self._compute(tokens, positions, memory, cache)  # compiles and warms up, which cannot be recorded
                self._graphs[key] = _Graph(self._compute, tokens, positions, memory, cache)
                if len(self._graphs) > MOST_GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            logits = self._graphs[key].replay(tokens, positions)
        cache.length += tokens.shape[1]
        return logits


class _Graph:
    """A recorded step, for some shapes and some memory of a cache."""

    def __init__(
        self,
        compute: Callable[..., Tensor],
        tokens: Tensor,
        positions: Tensor,
        memory: list[list[Tensor]],
        cache: KVCache,
    ) -> None:
        self.tokens, self.positions = tokens.clone(), positions.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = compute(self.tokens, self.positions, memory, cache)

    def replay(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits


def compiled_decoder(model: Llama) -> CompiledDecoder | None:
    """The compiled decoder of a model; None, which is told, where it does not apply.

    It does not to banks and trees of adapters, routed MLPs, and an embedding in the host's memory beside a GPU. A LoRA
    adapter on weights that are not quantized is merged into them, in place.
    """
    waits_for_host = {
        "a bank of adapters": getattr(model, "adapter_bank", None) is not None,
        "a tree of adapters": getattr(model, "lora_tree", None) is not None,
        "routed MLPs": getattr(model, "mlp_routing", None) is not None,
        "an embedding in the host's memory": isinstance(model.model.embed_tokens, HostEmbedding),
    }
    if why := [name for name, has in waits_for_host.items() if has]:
        progress(f"not compiled: {' and '.join(why)}")
        return None
    layers = [layer for _, layer in lora_layers(model)]
    if layers and all(isinstance(layer.linear, nn.Linear) for layer in layers):
        merge_lora(model)
    return CompiledDecoder(model)


def _mark_symbols(tokens: Tensor, positions: Tensor, cache: KVCache) -> None:
    """Sizes for which nothing is to be compiled anew; 1 has code of its own."""
    sizes = [(tensor, dim) for tensor in (tokens, positions) for dim in (0, 1)]
    sizes += [(tensor, dim) for tensor in cache.tensors() for dim in (0, 2)]
    for tensor, dim in sizes:
        if tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
