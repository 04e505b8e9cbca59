"""How much memory a training run will take at its peak, part by part, and which settings would fit.

The parts are counted from the shapes: what is stored (weights, adapter, gradients, optimizer), what the forward pass
keeps for the backward (`activations.py` says by which setting what), and the larger of the two moments that come on
top: the loss, when all activations are there, or the backward of one layer. Pure arithmetic, no model is built.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from lit_llama.activations import ActivationConfig
from lit_llama.config import LlamaConfig
from lit_llama.functional import QUERY_BLOCK
from lit_llama.lora import LoRAConfig
from lit_llama.loss import chunk_sizes

# Bytes of a stored weight of the decoder layers, scales included (int8: plus 4 a row, left out).
_QUANTIZED_BYTES = {"nf4": 4.5 / 8, "nf4-dq": 4.127 / 8, "int4": 5 / 8, "int8": 1.0}

# What glibc's heap and oneDNN's scratch memory hold beyond the tensors on a CPU: a share of all activations, some
# layers' worth of them, and a library. Fitted to 21 runs of SmolLM2-135M (512 and 2,048 tokens, every switch), all of
# which it then meets within a tenth.
_HEAP_OF_ACTIVATIONS, _HEAP_OF_A_LAYER, _BITSANDBYTES = 0.1, 12, 45_000_000


@dataclass(frozen=True)
class TrainingSetup:
    """All that decides the memory of a run on one device."""

    lora: LoRAConfig | None = field(default_factory=LoRAConfig)
    """None: all weights are trained."""
    quantize: str | None = None
    embeddings: str | None = None
    optimizer: str = "adamw"
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    micro_batch_size: int = 4
    sequence_length: int = 512
    dtype: torch.dtype = torch.bfloat16
    device_type: str = "cuda"

    def options(self) -> dict[str, object]:
        """The settings as they are written on a command line; None where one is left out."""
        return {
            "--train.micro_batch_size": self.micro_batch_size,
            "--train.sequence_length": self.sequence_length,
            "--quantize": self.quantize,
            "--embeddings": self.embeddings,
            "--train.optimizer": self.optimizer if self.optimizer != "adamw" else None,
            "--activations.checkpoint": self.activations.checkpoint or None,
            "--activations.mlp_tiles": self.activations.mlp_tiles if self.activations.mlp_tiles > 1 else None,
            "--activations.offload": "true" if self.activations.offload else None,
        }

    def switches(self) -> str:
        """The settings as one line of options."""
        return " ".join(f"{name} {value}" for name, value in self.options().items() if value is not None)

    def differences(self, other: "TrainingSetup") -> list[str]:
        """The options of this setup that `other` has not."""
        others = other.options()
        return [f"{name} {value}" for name, value in self.options().items() if value != others[name]]

    def resumes(self, other: "TrainingSetup") -> bool:
        """Whether a run begun with `other` may go on with this one: it computes the same."""
        free = {"activations": other.activations, "micro_batch_size": other.micro_batch_size}
        return replace(self, **free) == other


def estimate_memory(config: LlamaConfig, setup: TrainingSetup) -> dict[str, int]:
    """Bytes at the peak, by part: weights, adapter, gradients, optimizer, activations, loss, working memory.

    The sum is the peak. `loss` and `working memory` are not needed at the same time: the smaller of them counts 0. Not
    in it: the CUDA context and what the process takes before it loads anything (`scripts/estimate_memory.py` adds it).
    On a CPU there is `heap` as well.
    """
    h, m, layers, vocab = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    size = setup.dtype.itemsize
    tokens = setup.micro_batch_size * setup.sequence_length
    heads = 1 if config.tie_word_embeddings else 2

    linears = layers * (h * (2 * q + 2 * kv) + 3 * h * m)
    weights = linears * (_QUANTIZED_BYTES[setup.quantize] if setup.quantize else size) + (2 * layers + 1) * h * size
    table = vocab * h
    if setup.embeddings == "int8":
        weights += heads * table
    else:
        weights += (heads - (setup.embeddings == "cpu")) * table * size

    adapter_shapes = list(_adapter_shapes(config, setup.lora)) if setup.lora else []
    adapter = sum(rank * (rows + columns) for rank, rows, columns in adapter_shapes)
    whole = 0 if setup.lora else config.num_parameters
    if setup.lora and setup.lora.modules_to_save:
        whole = table * (1 if config.tie_word_embeddings else len(setup.lora.modules_to_save))
    # What is trained as a whole in bf16 has an fp32 master, and its gradient is collected in fp32.
    masters = whole * 4 if size < 4 else 0
    trained = adapter + whole
    moments = trained * (2.03 if "8bit" in setup.optimizer else 8)
    initial_factors = adapter * 4 if setup.lora and setup.lora.init != "kaiming" else 0

    ranks = sum(rank for rank, _, _ in adapter_shapes) // layers  # of a layer's linear layers, together
    kept_layer_input = h * size
    # residual twice, queries and output, keys and values, gate and up, A x of each adapter, two norms' factors
    kept = (2 * h + 2 * q + 2 * kv + 2 * m + ranks) * size + 8
    every = setup.activations.checkpoint
    checkpointed = -(-layers // every) if every else 0
    offloading = setup.activations.offload and setup.device_type == "cuda"
    recomputed_layer = 0
    if checkpointed or offloading:
        everything = kept + (2 * h + m) * size  # in these layers norms and SwiGLU are kept as well
        recomputed_layer = everything * tokens
        if setup.activations.mlp_tiles > 1:
            recomputed_layer -= (3 * m + h) * size * tokens
    tiles = setup.activations.mlp_tiles
    if tiles > 1:
        kept -= (2 * m - h) * size
    if offloading:
        activations = 2 * kept_layer_input * tokens  # on their way
    else:
        activations = (checkpointed * kept_layer_input + (layers - checkpointed) * kept) * tokens

    chunk, softmax_rows = chunk_sizes(setup.device_type, vocab)
    chunk = min(chunk, tokens)
    loss = chunk * vocab * size + min(softmax_rows, chunk) * vocab * 4 + 3 * tokens * h * size
    dense_weight = h * max(m, q) * size if setup.quantize else 0
    scores = setup.micro_batch_size * config.num_attention_heads * min(QUERY_BLOCK, setup.sequence_length)
    attention = 3 * scores * setup.sequence_length * size if setup.device_type == "cpu" else 0
    # gradients of product, gate and up beside the product, of one tile; or those of attention
    working = recomputed_layer + dense_weight + 3 * tokens * h * size
    working += max(5 * tokens // tiles * m * size, attention + 2 * tokens * (q + kv) * size)
    if tiles > 1:
        working += tokens // tiles * 3 * m * size
    parts = {
        "weights": weights + masters,
        "adapter": adapter * 4 + initial_factors,
        "gradients": trained * 4 + (whole * size if masters else 0),
        "optimizer": moments,
        "activations": activations,
        "loss": loss if loss > working else 0,
        "working memory": working if working >= loss else 0,
    }
    if setup.device_type == "cpu":
        everything = (kept + (2 * m * size if tiles > 1 else 0)) * tokens
        parts["heap"] = _HEAP_OF_ACTIVATIONS * activations + _HEAP_OF_A_LAYER * everything
        parts["heap"] += (_BITSANDBYTES if setup.quantize else 0) + (2 * table * size if setup.embeddings else 0)
    return {name: round(value) for name, value in parts.items()}


def peak(config: LlamaConfig, setup: TrainingSetup) -> int:
    """The sum of `estimate_memory`."""
    return sum(estimate_memory(config, setup).values())


def _adapter_shapes(config: LlamaConfig, lora: LoRAConfig) -> Iterator[tuple[int, int, int]]:
    """(rank, out, in) of each adapted layer."""
    h, m = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q), "mlp.gate_proj": (m, h), "mlp.up_proj": (m, h), "mlp.down_proj": (h, m),
    }  # fmt: skip
    names = {
        f"model.layers.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in shapes.items()
    }
    for name, (rows, columns) in {**names, "lm_head": (config.vocab_size, h)}.items():
        if lora.adapts(name):
            yield lora.rank(name), rows, columns


def fitting_setups(config: LlamaConfig, setup: TrainingSetup, budget: int) -> Iterator[TrainingSetup]:
    """Setups that fit into `budget` bytes, those that change least first.

    Switches that leave the result as it is come first (recomputation, tiles, smaller micro-batches), then those that
    change it a little (8-bit optimizer, NF4), then shorter windows.
    """
    lighter = [setup]
    while setup.micro_batch_size > 1:
        setup = replace(setup, micro_batch_size=setup.micro_batch_size // 2)
        lighter.append(setup)
    checkpointed = replace(setup.activations, checkpoint=1)
    lighter += [replace(s, activations=checkpointed) for s in list(lighter)]
    setup = replace(setup, activations=checkpointed)
    tiled = replace(checkpointed, mlp_tiles=max(checkpointed.mlp_tiles, 4))
    lighter.append(replace(setup, activations=tiled))
    if setup.lora is not None and setup.quantize is None:
        lighter += [replace(s, quantize="nf4-dq") for s in list(lighter)]
    setup = replace(lighter[-1], optimizer="paged-adamw-8bit" if setup.device_type == "cuda" else "adamw-8bit")
    lighter.append(setup)
    if setup.embeddings is None and not (setup.lora and setup.lora.modules_to_save) and setup.lora is not None:
        setup = replace(setup, embeddings="int8")
        lighter.append(setup)
    while setup.sequence_length > 128:
        setup = replace(setup, sequence_length=setup.sequence_length // 2)
        lighter.append(setup)
    return (candidate for candidate in lighter if peak(config, candidate) <= budget)


def longest_sequence(config: LlamaConfig, setup: TrainingSetup, budget: int) -> int:
    """The most tokens of one window that fit into `budget` bytes; 0 where not even 128 do."""
    low, high = 0, 128
    fits = lambda length: peak(config, replace(setup, sequence_length=length)) <= budget  # noqa: E731
    while fits(high):
        low, high = high, 2 * high
    while high - low > 64:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
