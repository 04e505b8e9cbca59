"""The cache of keys and values that generation goes on from.

Its memory grows with what is read, up to what a model with a sliding window can still see, and may be held in 8 bits.
Who fills it is `model.Attention`, or in its place `cpu_decode.py`; whose rows they are is `batching.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.config import CacheQuantization, LlamaConfig
from lit_llama.errors import InputError
from lit_llama.quantization import to_int8

PASS_TOKENS = 2048
"""Of a row, which may be read in one pass behind a sliding window that is full."""
_TAKEN_BACK = 16
"""Tokens at most that are read for nothing, since guesses of them were wrong (`drafting.py`)."""
_STORED = ("keys", "values", "key_scales", "value_scales")


class KVCache:
    """Keys and values of the tokens seen so far: (batch, kv_heads, capacity, head_dim) a layer.

    Memory is set aside as tokens come, doubling up to `max_length`; with a sliding window up to the window and a pass
    more, and then the latest token takes the place of the one that no query sees any more.

    Prompts of different lengths are padded on the left; `padding` then holds the number of padding tokens of each row,
    which no real query sees and no position counts. They are not stored in front: a row's tokens lie at their own
    positions, so that a row is summed up in the same order, and so to the same bits, as it would be alone.

    In int8 each head's key and value of a token has a scale of its own (`key_scales`, `value_scales`: (batch, kv_heads,
    capacity, 1) fp32 a layer, else empty), after the rotation: 68 bytes of 64 numbers where bf16 takes 128.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        padding: Tensor | None = None,  # (batch,) int64
        quantize: CacheQuantization | None = None,
    ) -> None:
        if max_length > config.max_position_embeddings:
            raise InputError(
                f"a sequence of {max_length} tokens is longer than the model's context of"
                f" {config.max_position_embeddings}"
            )

        def empty(size: int, dtype: torch.dtype) -> list[Tensor]:
            memory = torch.empty(batch_size, config.num_key_value_heads, 0, size, dtype=dtype, device=device)
            return [memory] * config.num_hidden_layers

        stored = torch.int8 if quantize else dtype
        self.keys, self.values = empty(config.head_dim, stored), empty(config.head_dim, stored)
        self.key_scales, self.value_scales = (empty(1, torch.float32) if quantize else [] for _ in range(2))
        self.dtype = dtype
        """Of the keys and values that come and are seen."""
        self.max_length = max_length
        self.sliding_window = config.sliding_window
        self.padding = padding
        self.row_state: dict[str, Tensor] = {}
        """What else is to be remembered of each row, (batch, ...) each, by whatever wraps the model."""
        self.length = 0
        """Tokens read, padding included."""
        self._reached = 0
        self.positions = torch.empty(1, 0, dtype=torch.int64, device=device)
        """Of the tokens of the pass under way, (batch or 1, new) int64; padding has that of the first."""
        self.columns = self.positions
        """Where it stores them, (batch or 1, new): padding where the row's later tokens will overwrite it."""
        self.first: Tensor | None = None
        """Position of the first key that it sees, (batch, 1), where a window has rolled on; None: 0."""
        self.attended = 0
        """Keys that it sees."""
        self._mask: Tensor | None = None
        self._masked = self._rolling = False
        self._most_columns = _round_up(max_length)
        if self.sliding_window is not None:
            self._most_columns = min(self._most_columns, _round_up(self.sliding_window + PASS_TOKENS))

    @property
    def capacity(self) -> int:
        """Tokens of a row that there is memory for: the one at a position lies in column position % capacity."""
        return self.keys[0].shape[2]

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    def tensors(self) -> Iterator[Tensor]:
        """All that is stored, (batch, kv_heads, capacity, ...) each."""
        for name in _STORED:
            yield from getattr(self, name)

    def wind_back(self, length: int) -> None:
        """Forget all but so many tokens, padding included.

        Raises:
            InputError: those that the next one would see are no longer there.
        """
        reached = self.reached
        if self.kept(length, reached) != length:
            raise InputError(f"the sliding window has rolled on from token {length:,} to {reached:,}")
        self.length, self._reached = length, reached if length else 0

    @property
    def reached(self) -> int:
        """Most tokens that were ever read behind the first, whether they were wound back or not: see `kept`."""
        return max(self._reached, self.length)

    def prepare(self, new: int, in_order: bool = False) -> None:
        """Make ready for a pass over `new` more tokens a row: check the room, work out the places for all layers.

        Several tokens see the keys in the order of their positions, one as they lie, unless told otherwise.

        Raises:
            InputError: see `reserve`.
        """
        self.reserve(new)
        total, self._mask = self.length + new, None
        self.attended = min(_round_up(total), self.capacity)
        positions = torch.arange(self.length, total, device=self.device)[None]
        if self.padding is not None:
            positions = positions - self.padding[:, None]
        self.columns = positions.remainder(min(total, self.capacity))
        self.positions = positions if self.padding is None else positions.clamp_min(0)
        self._rolling = total > self.capacity
        self.first = None
        if self._rolling and (new > 1 or in_order):
            self.first = (self.positions[:, -1:] - self.attended + 1).clamp_min(0)
        self._masked = self.padding is not None or new > 1 or total != self.attended or self.windowed(total)

    def windowed(self, total: int) -> bool:
        """Whether the last of so many tokens does not see all that came before it."""
        return self.sliding_window is not None and total > self.sliding_window

    @property
    def mask(self) -> Tensor | None:
        """Of the pass under way: (batch or 1, 1, new, attended), -inf where a query must not look, else 0."""
        if self._mask is None and self._masked:
            held = torch.arange(self.attended, device=self.device)  # positions of the keys
            if self.first is not None:
                held = (self.first + held)[:, None]
            elif self._rolling:
                last = self.positions[:, -1:]
                held = (last - (last - held).remainder(self.capacity))[:, None]  # negative: nothing yet
            hidden = (held > self.positions[..., None]) | (held < 0)
            if self.sliding_window is not None:
                hidden |= held <= self.positions[..., None] - self.sliding_window
            bias = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
            self._mask = bias.masked_fill_(hidden, float("-inf"))[:, None]
        return self._mask

    def reserve(self, new: int) -> None:
        """See that there is memory for `new` more tokens a row.

        Raises:
            InputError: there are more than `max_length`, or more than fit behind a window that is full.
        """
        total = self.length + new
        if total > self.max_length:
            raise InputError(f"the cache holds {self.max_length} tokens; {total} are needed")
        if total > self._most_columns and new > self._most_columns - self.sliding_window:
            if self.length > self.capacity:
                most = self.capacity - self.sliding_window
                raise InputError(f"{new} tokens at once behind a sliding window; at most {most} can be read")
            self._most_columns = _round_up(self.sliding_window + new)
        capacity, needed = self.capacity, min(_round_up(total), self._most_columns)
        if needed > capacity:
            more = max(needed, min(2 * capacity, self._most_columns)) - capacity
            # By zeros: what is not written yet is masked, but 0 * NaN would still be NaN.
            self._change(lambda tensor: F.pad(tensor, (0, 0, 0, more)))

    def rows(self, start: int, end: int, lengths: Sequence[int]) -> "KVCache":
        """The rows from `start` to `end` as a cache of their own, in the same memory, that holds `lengths` tokens.

        Memory for the tokens to come must be reserved before; what they do to the row state stays there.
        """
        rows = copy(self)
        rows._change(lambda tensor: tensor[start:end])
        rows.length = max(lengths)
        rows.padding = None
        if min(lengths) < rows.length:
            rows.padding = torch.tensor([rows.length - length for length in lengths], device=self.device)
        rows.row_state = {name: state[start:end] for name, state in self.row_state.items()}
        return rows

    def kept(self, beginning: int, reached: int) -> int:
        """Of a row, whether it can go back to a beginning of what it has read: its length, or 0.

        It cannot where later tokens have taken the place of some that the next one would see. They have not given it
        back when the row itself has gone back since: `reached` is the most that it ever held.
        """
        if reached <= self.capacity or beginning - self.sliding_window >= reached + _TAKEN_BACK - self.capacity:
            return beginning
        return 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values of one layer; returns all that the mask covers."""
        keys = self._append(self.keys, self.key_scales, layer, key)
        return keys, self._append(self.values, self.value_scales, layer, value)

    def _append(self, stored: list[Tensor], scales: list[Tensor], layer: int, new: Tensor) -> Tensor:
        if not scales:
            self._store(stored[layer], new)
            return self._seen(stored[layer])
        codes, scale = to_int8(new)
        self._store(stored[layer], codes)
        self._store(scales[layer], scale)
        return (self._seen(stored[layer]) * self._seen(scales[layer])).to(self.dtype)

    def _store(self, tensor: Tensor, new: Tensor) -> None:
        if self.padding is None and not self._rolling:
            tensor[:, :, self.length : self.length + new.shape[2]] = new
        else:
            tensor.scatter_(2, self.columns[:, None, :, None].expand_as(new), new)

    def _seen(self, tensor: Tensor) -> Tensor:
        if self.first is None:
            return tensor[:, :, : self.attended]
        columns = (self.first + torch.arange(self.attended, device=self.device)).remainder(self.capacity)
        return tensor.gather(2, columns[:, None, :, None].expand(len(tensor), tensor.shape[1], -1, tensor.shape[3]))

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (int64 indices): fewer as some end, or one several times for several answers."""
        self._change(lambda tensor: tensor[rows])
        if self.padding is not None:
            self.padding = self.padding[rows]
        self.row_state = {name: state[rows] for name, state in self.row_state.items()}

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        changed = {name: [change(tensor) for tensor in getattr(self, name)] for name in _STORED}
        for name, tensors in changed.items():  # not before there was memory for all
            setattr(self, name, tensors)


class StepCache(KVCache):
    """Some rows of a cache within one pass of a few tokens, for functions that are compiled or recorded.

    Whatever changes from pass to pass is computed from tensors: `positions` (rows, new) of the tokens, none of it
    padding. The memory is the other cache's, with room for the tokens, and everything in it is attended to.
    """

    def __init__(self, cache: KVCache, memory: list[list[Tensor]], positions: Tensor) -> None:
        self.keys, self.values, self.key_scales, self.value_scales = memory
        self.dtype, self.sliding_window = cache.dtype, cache.sliding_window
        self.padding = self.first = self._mask = None
        self.length, self.row_state = 0, {}
        self.attended = self.capacity
        self.positions, self.columns = positions, positions.remainder(self.capacity)
        self._masked = self._rolling = True  # the formulas that hold in any case

    def prepare(self, new: int, in_order: bool = False) -> None:
        """Nothing is left to prepare."""


def _round_up(length: int) -> int:
    """To whole vectors of the softmax kernels: else the last bit of a row's sum would depend on how long others are."""
    return -(-length // 16) * 16
