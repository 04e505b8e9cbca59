"""The training steps that `benchmark_training.py` compares: this project's, with its switches, and the peers'."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_llama.activations import ActivationConfig, apply_activation_config
from lit_llama.config import LlamaConfig

SWITCHES: dict[str, dict[str, Any]] = {
    "lit-llama": {},
    "lit-llama, checkpoint 2": {"activations": ActivationConfig(checkpoint=2)},
    "lit-llama, checkpoint 1": {"activations": ActivationConfig(checkpoint=1)},
    "lit-llama, mlp_tiles 4": {"activations": ActivationConfig(mlp_tiles=4)},
    "lit-llama, compile": {"compile_layers": True},
    "lit-llama, int8": {"quantize": "int8"},
    "lit-llama, nf4-dq": {"quantize": "nf4-dq"},
    "lit-llama, nf4-dq, checkpoint 1": {"quantize": "nf4-dq", "activations": ActivationConfig(checkpoint=1)},
    "lit-llama, nf4-dq, int8 embeddings": {"quantize": "nf4-dq", "embeddings": "int8"},
    "lit-llama, adamw-8bit": {"optimizer": "adamw-8bit"},
    "lit-llama, least memory": {
        "quantize": "nf4-dq",
        "embeddings": "int8",
        "optimizer": "adamw-8bit",
        "activations": ActivationConfig(checkpoint=1, mlp_tiles=8, offload=True),
    },
}
CONTESTANTS = (*SWITCHES, "transformers + peft", "transformers + peft, checkpointing", "litgpt")


def installed_peers() -> list[str]:
    """Peers that are installed."""
    needed = {"transformers + peft": "peft", "litgpt": "litgpt"}
    return [name for name, package in needed.items() if importlib.util.find_spec(package)]


class Shape(NamedTuple):
    """What every contestant trains on."""

    checkpoint_dir: Path | None
    model: str | None
    device: torch.device
    r: int
    batch_size: int
    sequence_length: int
    document_length: int | None

    def config(self) -> LlamaConfig:
        """Of the base model."""
        if self.checkpoint_dir is None:
            return LlamaConfig.from_name(self.model)
        return LlamaConfig.from_json(self.checkpoint_dir)

    def flops_per_token(self) -> float:
        """Of forward and backward: 4 a weight of a linear layer or the head (none is trained), and causal attention."""
        config = self.config()
        table = config.vocab_size * config.hidden_size
        weights = config.num_parameters - (0 if config.tie_word_embeddings else table)
        keys = self.document_length or self.sequence_length  # half of them on average
        attention = 6 * keys * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        return 4 * weights + attention

    def description(self) -> dict[str, Any]:
        """As it is recorded."""
        return {
            "model": self.model or self.checkpoint_dir.name, "device": self.device.type, "precision": "bf16",
            "r": self.r, "targets": "all linear layers", "batch_size": self.batch_size,
            "sequence_length": self.sequence_length, "document_length": self.document_length,
        }  # fmt: skip

    def tokens(self, extra: int = 1) -> Tensor:
        """(batch_size, sequence_length + extra) random ids, the same for every contestant."""
        generator = torch.Generator().manual_seed(0)
        size = (self.batch_size, self.sequence_length + extra)
        return torch.randint(0, self.config().vocab_size, size, generator=generator).to(self.device)

    def documents(self) -> list[list[int]]:
        """Lengths of the documents in each sequence, between a half and one and a half of the mean."""
        if self.document_length is None:
            return [[self.sequence_length]] * self.batch_size
        generator = torch.Generator().manual_seed(1)
        rows = []
        for _ in range(self.batch_size):
            row: list[int] = []
            while sum(row) < self.sequence_length:
                half = self.document_length // 2
                length = half + int(torch.randint(0, 2 * half + 1, (), generator=generator))
                row.append(min(max(1, length), self.sequence_length - sum(row)))
            rows.append(row)
        return rows


def build_step(contestant: str, shape: Shape) -> tuple[Callable[[], None], int]:
    """(a function that trains one step, target tokens of a step)."""
    if contestant in SWITCHES:
        return own_step(shape, **SWITCHES[contestant])
    if contestant == "litgpt":
        return litgpt_step(shape)
    return peft_step(shape, checkpointing=contestant.endswith("checkpointing"))


def own_step(
    shape: Shape,
    quantize: str | None = None,
    embeddings: str | None = None,
    optimizer: str = "adamw",
    activations: ActivationConfig | None = None,
    compile_layers: bool = False,
) -> tuple[Callable[[], None], int]:
    """With this project's parts, as the training loop puts them together."""
    from lit_llama.hardware import keep_freed_memory
    from lit_llama.lora import LoRAConfig, inject_lora
    from lit_llama.loss import head_loss
    from lit_llama.optimizer import Optimizer

    if shape.device.type == "cpu":
        keep_freed_memory()
    model = own_model(shape, quantize, embeddings)
    inject_lora(model, LoRAConfig(r=shape.r, alpha=2 * shape.r))
    apply_activation_config(model, activations or ActivationConfig(), shape.device, compile_layers)
    model.train()
    adamw = Optimizer(model, 0.0, (0.9, 0.95), optimizer)
    tokens = shape.tokens()
    document_ids = position_ids = None
    if shape.document_length is not None:
        lengths = [torch.tensor(row) for row in shape.documents()]
        document_ids = torch.stack([torch.arange(len(row)).repeat_interleave(row) for row in lengths]).to(shape.device)
        position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).to(shape.device)

    def step() -> None:
        hidden = model.model(tokens[:, :-1], position_ids, document_ids)
        head_loss(model.lm_head, hidden, tokens[:, 1:]).backward()
        adamw.step(1e-4)

    return step, shape.batch_size * shape.sequence_length


def own_model(shape: Shape, quantize: str | None, embeddings: str | None) -> nn.Module:
    """From the checkpoint, or of random weights that are quantized layer by layer, as loading does."""
    from lit_llama.checkpoint import load_model
    from lit_llama.model import Llama
    from lit_llama.quantization import QuantizedEmbedding, QuantizedLinear

    if shape.checkpoint_dir is not None:
        return load_model(shape.checkpoint_dir, torch.bfloat16, shape.device, quantize, embeddings)
    with torch.device("meta"):
        model = Llama(shape.config()).to(torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=shape.device)
        torch.nn.init.ones_(weight) if weight.ndim == 1 else torch.nn.init.normal_(weight, std=0.02)
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        if quantize and ".layers." in name and weight.ndim == 2:
            setattr(model.get_submodule(parent), child, QuantizedLinear.from_weight(weight, quantize))
        elif embeddings == "int8" and child in ("embed_tokens", "lm_head"):
            table = QuantizedLinear.from_weight(weight, "int8")
            replacement = table if child == "lm_head" else QuantizedEmbedding(table, torch.bfloat16)
            setattr(model.get_submodule(parent) if parent else model, child, replacement)
        else:
            model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(weight, requires_grad=False)
    if model.config.tie_word_embeddings:
        raise SystemExit("--model: take an architecture whose head is not tied, or --checkpoint_dir")
    return model


def peft_step(shape: Shape, checkpointing: bool) -> tuple[Callable[[], None], int]:
    """With transformers' model and loss and PEFT's adapter."""
    import peft
    import transformers

    if shape.checkpoint_dir is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(shape.checkpoint_dir, dtype=torch.bfloat16)
        model.to(shape.device)
    else:
        config = transformers.LlamaConfig(**shape.config().to_huggingface())
        with torch.device(shape.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=shape.r, lora_alpha=2 * shape.r, target_modules=targets))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batches = [{"input_ids": (tokens := shape.tokens(extra=0)), "labels": tokens}]
    if shape.document_length is not None:
        batches = padded_batches(shape)

    def step() -> None:
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, shape.batch_size * shape.sequence_length


def padded_batches(shape: Shape) -> list[dict[str, Tensor]]:
    """The documents of the packed sequences, of like length together, padded to the longest of their batch.

    As many batches as keep the padded tokens of one near those of a packed batch.
    """
    lengths = sorted(length for row in shape.documents() for length in row)
    rows = max(1, shape.batch_size * shape.sequence_length // lengths[-1])
    tokens = shape.tokens(extra=0).flatten()
    batches = []
    for start in range(0, len(lengths), rows):
        group = lengths[start : start + rows]
        mask = torch.arange(group[-1]) < torch.tensor(group)[:, None]
        input_ids = tokens[: mask.numel()].view(mask.shape)
        mask = mask.to(shape.device)
        labels = input_ids.masked_fill(~mask, -100)
        batches.append({"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels})
    return batches


def litgpt_step(shape: Shape) -> tuple[Callable[[], None], int]:
    """With litgpt's model, chunked head and loss, as its finetune_lora does; of random weights."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    own = shape.config()
    config = Config(
        name="same shape", block_size=own.max_position_embeddings, vocab_size=own.vocab_size,
        padded_vocab_size=own.vocab_size, n_layer=own.num_hidden_layers, n_head=own.num_attention_heads,
        n_embd=own.hidden_size, head_size=own.head_dim, n_query_groups=own.num_key_value_heads,
        intermediate_size=own.intermediate_size, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", rope_base=int(own.rope_theta),
        norm_eps=own.rms_norm_eps, lora_r=shape.r, lora_alpha=2 * shape.r, lora_dropout=0.0, lora_query=True,
        lora_key=True, lora_value=True, lora_projection=True, lora_mlp=True, lora_head=False,
    )  # fmt: skip
    with torch.device(shape.device):
        model = GPT(config)
    model.to(torch.bfloat16)
    mark_only_lora_as_trainable(model)
    model.max_seq_length = shape.sequence_length
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    tokens = shape.tokens()

    def step() -> None:
        logits = model(tokens[:, :-1], lm_head_chunk_size=128)
        chunked_cross_entropy(logits, tokens[:, 1:], chunk_size=0).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, shape.batch_size * shape.sequence_length
