"""The whole Llama in one file, with Hugging Face's module and parameter names.

RMSNorm, rotary embedding, grouped-query attention with an optional sliding window, SwiGLU MLP. LoRA, quantization and
the like wrap the named linear layers from outside; nothing here knows of them. The cache of keys and values that
generation goes on from is `kv_cache.py`.

    input_ids (batch, length)
      -> embed_tokens                     (batch, length, hidden)
      -> num_hidden_layers x DecoderLayer
           x = x + self_attn(input_layernorm(x))
           x = x + mlp(post_attention_layernorm(x))
      -> norm                             normalised hidden states, what `model.model(...)` returns
      -> lm_head                          logits (batch, length, vocab)
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.functional import (
    ROW_BLOCK,
    CausalMask,
    RMSNormFunction,
    SwiGLUFunction,
    attention,
    recomputed,
    rms_norm,
    rotate,
    swiglu,
)

if TYPE_CHECKING:
    from lit_llama.compiled_decode import CompiledDecoder
    from lit_llama.cpu_decode import CPUDecoder
    from lit_llama.kv_cache import KVCache


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned weight; see `functional.RMSNormFunction`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.attend: Callable[..., Tensor] = attention
        """How queries meet keys; a module in its place (`prompt_tuning.py`) adds learned ones."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: CausalMask | None, cache: "KVCache | None") -> Tensor:
        batch, length, _ = x.shape
        # (batch, length, heads * head_dim) -> (batch, heads, length, head_dim)
        shape = (batch, length, -1, self.head_dim)
        query = rotate(self.q_proj(x).view(shape).transpose(1, 2), cos, sin)
        key = rotate(self.k_proj(x).view(shape).transpose(1, 2), cos, sin)
        value = self.v_proj(x).view(shape).transpose(1, 2).contiguous()
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        mixed = self.attend(query, key, value, mask if cache is None else cache.mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.recompute_cheap, self.tiles = True, 1
        """How activations are kept for a backward; see `activations.py`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.tiles == 1 or not torch.is_grad_enabled():
            return self.feed_forward(x)
        rows = x.flatten(0, -2)
        size = -(-len(rows) // (self.tiles * ROW_BLOCK)) * ROW_BLOCK
        random_state = torch.get_rng_state()
        outputs = []
        for start in range(0, len(rows), size):
            torch.set_rng_state(random_state)  # dropout of each piece is that of the whole
            outputs.append(checkpoint(self._piece, rows[start : start + size], start, use_reentrant=False))
        return torch.cat(outputs).view(x.shape)

    def _piece(self, rows: Tensor, start: int) -> Tensor:
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            projection.first_row = start
        return self.feed_forward(rows)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) through the MLP at once."""
        return self.combine(self.gate_proj(x), self.up_proj(x))

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """down(silu(gate) * up), with the product made again for a backward rather than kept."""
        product = SwiGLUFunction.apply(gate, up)
        if not (self.recompute_cheap and self.tiles == 1 and torch.is_grad_enabled()):
            return self.down_proj(product)
        gate, up = gate.detach(), up.detach()
        with recomputed(product, lambda: swiglu(gate, up)):
            return self.down_proj(product)


class DecoderLayer(nn.Module):
    """Attention and MLP, each on the normalised input and added back to it."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: CausalMask | None, cache: "KVCache | None") -> Tensor:
        normed = self.input_layernorm(x)
        with self._not_kept(normed, self.input_layernorm, x):
            x = x + self.self_attn(normed, cos, sin, mask, cache)
        normed = self.post_attention_layernorm(x)
        with self._not_kept(normed, self.post_attention_layernorm, x):
            return x + self.mlp(normed)

    def _not_kept(self, normed: Tensor, norm: RMSNorm, x: Tensor) -> AbstractContextManager:
        if not (self.mlp.recompute_cheap and torch.is_grad_enabled()):
            return nullcontext()
        x = x.detach()
        return recomputed(normed, lambda: rms_norm(x, norm.weight, norm.eps)[0])


def call_layer(layer: DecoderLayer, *arguments: Any) -> Tensor:
    """A decoder layer as it is; `activations.py` has others that keep less for the backward."""
    return layer(*arguments)


class LlamaModel(nn.Module):
    """Everything but the head: tokens to normalised hidden states."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        embeddings = torch.empty(config.vocab_size, config.hidden_size)
        if not embeddings.is_meta:  # where drawing numbers imports a compiler, for seconds
            nn.init.normal_(embeddings)
        self.embed_tokens = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.run_layer: Callable[..., Tensor] = call_layer
        # Not a buffer: it must stay fp32 when the model is cast to bf16, and real when the model is built on meta.
        self._inverse_frequencies = rotary_inverse_frequencies(config)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: "KVCache | None" = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (batch, length) int64.
            position_ids: (batch, length) int64 rotary positions; by default 0, 1, ... (after what a cache holds).
            document_ids: (batch, length) int64; a token attends only to tokens of its own document, whose tokens lie
                together. Not with a cache.
            cache: keys and values of the tokens before; the new ones are added to it.

        Returns:
            (batch, length, hidden) in the dtype of the weights.

        Raises:
            InputError: there are more tokens than the cache has room for.
        """
        batch, length = input_ids.shape
        if cache is not None:
            if document_ids is not None:
                raise InputError("document_ids cannot be used together with a cache")
            cache.prepare(length)
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None] if cache is None else cache.positions
        x = self.embed_tokens(input_ids)
        cos, sin = self.rotary_tables(position_ids, x.dtype)
        mask = None
        if cache is None:  # which has one of its own
            mask = CausalMask(length, document_ids, self.config.sliding_window, x.device)
        for layer in self.layers:
            x = self.run_layer(layer, x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += length
        return self.norm(x)

    def rotary_tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions, (batch, 1, length, head_dim), computed in fp32; for `functional.rotate`."""
        if self._inverse_frequencies.device != position_ids.device:
            self._inverse_frequencies = self._inverse_frequencies.to(position_ids.device)
        angles = position_ids[:, None, :, None] * self._inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


class Llama(nn.Module):
    """A Llama or Mistral language model."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.fingerprint: str | None = None
        """Which base checkpoint the weights came from (`checkpoint.fingerprint`); adapters remember it."""
        self.decoder: CPUDecoder | CompiledDecoder | None = None
        """Computes what generation needs in place of the layers, where that is faster."""
        self.labels: list[str] | None = None
        """Of a classifier, whose head has a row for each of them (`classification.py`)."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: "KVCache | None" = None,
    ) -> Tensor:
        """Logits (batch, length, vocab) in the dtype of the weights; arguments as in `LlamaModel.forward`."""
        return self.lm_head(self.model(input_ids, position_ids, document_ids, cache))

    def initialize_(self, std: float = 0.02) -> None:
        """Draw all weights afresh (normal, norms to one) to pretrain from nothing."""
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=std)


def rotary_inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Angles per position of the head_dim / 2 rotated pairs, fp32 (head_dim / 2,).

    Scaling "linear" divides all by a factor; "llama3" divides the long wavelengths and blends in between (Llama 3.1).
    """
    with torch.device("cpu"):
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        frequencies = 1.0 / (config.rope_theta**exponents)
        scaling = config.rope_scaling
        if scaling is None:
            return frequencies
        if scaling["rope_type"] == "linear":
            return frequencies / scaling["factor"]
        wavelengths = 2 * math.pi / frequencies
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
        smooth = smooth.clamp(0, 1)
        return (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies
