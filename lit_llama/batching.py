"""Many requests at once on one model: continuous batching, each row with its own adapter, sampling and end.

    submit -> waiting -> in a slot: its prompt is read, piece by piece -> running: a token a round, as all -> free

A slot is a row of one cache whose memory is set aside as it is needed and then stays. Running rows lie together at its
beginning, so that a round is one pass over views of it, and rows that come and go cost the copy of one row. What a slot
has read stays until the slot is needed, and a prompt begins with the longest beginning that any slot holds of it: a
shared system message is read once, and a conversation goes on where it was.

A batch that is known beforehand is faster read as one: `generation.py`, whose sampling and streaming this uses. HTTP is
`server.py`, guesses of coming tokens are `drafting.py`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from threading import Condition
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_llama.choices import Choices, ChoiceTree
from lit_llama.command_line import progress
from lit_llama.config import CacheQuantization
from lit_llama.drafting import Drafter, shared_length
from lit_llama.errors import InputError, RunError
from lit_llama.generation import (
    Sampler,
    SamplingConfig,
    Speed,
    TextStream,
    checked_length,
    logits_of,
    next_logits,
    read_prompt,
)
from lit_llama.kv_cache import KVCache
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer

PROMPT_TOKENS = 512
"""Of prompts, read in one round: what those that are being answered wait for at most, between two of their tokens."""
DRAFT_TOKENS = 4
"""Most guesses checked in a step: each costs a fraction of a step, and the chance that all before are right falls."""
DRAFT_ROWS = 4
"""Most rows with which guesses are made: with more of them, a step has no idle arithmetic to check guesses with."""


class Full(RunError):
    """As many requests wait as may; ask again later."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of the engine."""

    prompt: Sequence[int]
    """Token ids."""
    max_new_tokens: int | None = None
    """None: what the context leaves."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Of one sample: several are several requests with other seeds."""
    stop: Sequence[str] = ()
    """Strings that end the answer, besides the tokenizer's stop ids."""
    adapter: str | None = None
    """Of the model's bank; None: the base."""
    choices: ChoiceTree | None = None
    """The answer is one of these."""
    continuation: bool = False
    """The answer goes on with the prompt's text: a space that it begins with counts."""
    logprobs: int | None = None
    """None: no log-probabilities; n: those of the tokens, and of the n likeliest in their places."""


class TokenLogprob(NamedTuple):
    """A token and ln of its probability, before temperature, filters and choices changed it."""

    token_id: int
    text: str
    bytes: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()
    """The likeliest in its place, likeliest first."""


@dataclass(frozen=True)
class Piece:
    """Part of an answer."""

    text: str = ""
    """Certain: whole characters, and nothing that may yet become a stop string."""
    new_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the new tokens, if they were asked for."""
    finish_reason: Literal["stop", "length"] | None = None
    """Of the last piece: an end was met, or max_new_tokens."""


class Ticket:
    """A request on its way; `cached_tokens` of its prompt needed no reading."""

    def __init__(
        self, request: Request, max_new_tokens: int, engine: "Engine", deliver: Callable[[Piece | Exception], None]
    ) -> None:
        model, tokenizer = engine.model, engine.tokenizer
        self.request, self.deliver = request, deliver
        self.prompt = list(request.prompt)
        self.prompt_tokens, self.cached_tokens = len(self.prompt), 0
        self.max_new_tokens, self.new_tokens = max_new_tokens, 0
        self.cancelled = False
        self.pending = -1
        """Token drawn last, which the cache does not hold yet."""
        self.sampler = Sampler(request.sampling, [self.prompt], model.config.vocab_size, model.model.norm.weight.device)
        self.choices = None if request.choices is None else Choices(request.choices)
        self.stream = TextStream(tokenizer, request.stop, request.continuation or self.choices is not None)
        # Whose token is the likeliest, which is found for all rows at once.
        self.greedy = (request.sampling.temperature, request.sampling.repetition_penalty, self.choices) == (0, 1, None)
        self.drafter: Drafter | None = engine.make_drafter and engine.make_drafter()


@dataclass(eq=False)
class _Slot:
    """What a row of the cache holds, and for whom."""

    tokens: list[int] = field(default_factory=list)
    """Whose keys and values are there."""
    reached: int = 0
    """Most tokens that were there since the first of these was read, see `KVCache.kept`."""
    adapter: str | None = None
    """That computed them."""
    row_state: dict[str, Tensor] = field(default_factory=dict)
    """See `KVCache.row_state`."""
    ticket: Ticket | None = None
    last_used: int = 0


class Engine:
    """Answers requests, as many at a time as there are slots.

    A greedy answer does not depend on what else is asked, up to the rounding of matrix products; on a CPU with
    `cpu_decode.py`, only on which part of its prompt was read when. Adapters are not to be removed from the bank
    meanwhile.

    Args:
        model: ready to generate (`prepare_to_generate`), perhaps with a bank of adapters.
        slots: requests answered at a time; each can take the memory of `max_length` tokens.
        max_length: longest prompt and answer together; by default the model's context.
        max_waiting: requests that wait for a slot; None: as many as come.
        make_drafter: makes what guesses the tokens of one request; None: nothing is guessed.
        quantize_cache: how keys and values are stored, see `KVCache`.

    Raises:
        InputError: a number that makes no sense, or guesses for a model whose rows are routed by their prompt.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        slots: int = 16,
        max_length: int | None = None,
        max_waiting: int | None = 256,
        make_drafter: Callable[[], Drafter] | None = None,
        quantize_cache: CacheQuantization | None = None,
    ) -> None:
        context = model.config.max_position_embeddings
        self.max_length = context if max_length is None else max_length
        if slots < 1 or not 2 <= self.max_length <= context:
            raise InputError(f"{slots} slots of {self.max_length} tokens: at least 1, of 2 to {context} tokens")
        routed = getattr(model, "lora_tree", None) is not None
        if routed and make_drafter is not None:
            raise InputError("a tree of adapters may route by the prompt, which guessed tokens are not: leave them out")
        self.model, self.tokenizer, self.make_drafter = model, tokenizer, make_drafter
        self.max_waiting = max_waiting
        self.speed = Speed()
        """Of all rounds so far."""
        self.guessed = self.guessed_right = 0
        weight = model.model.norm.weight
        self._cache = KVCache(
            model.config, slots, self.max_length, weight.dtype, weight.device, quantize=quantize_cache
        )
        self._slots = [_Slot() for _ in range(slots)]  # in the order of the cache's rows
        self._reuses = not routed
        self._running = 0  # the slots before this one
        self._reading: _Slot | None = None
        self._round = 0
        self._waiting: deque[Ticket] = deque()
        self._changed = Condition()
        self._closed = False

    # --- from any thread

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return self._running + (self._reading is not None)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    def submit(self, request: Request, deliver: Callable[[Piece | Exception], None]) -> Ticket:
        """Ask; the answer is delivered piece by piece, from the thread of `step`, an exception in place of its rest.

        Raises:
            InputError: an empty prompt or one that leaves no room, no such adapter, choices that are none.
            Full: too many wait already.
            RunError: the engine is closed.
        """
        max_new_tokens = checked_length(self.model, [list(request.prompt)], request.max_new_tokens, self.max_length)
        bank = getattr(self.model, "adapter_bank", None)
        if request.adapter is not None and (bank is None or request.adapter not in bank.names):
            there = "no bank of them" if bank is None else ", ".join(bank.names)
            raise InputError(f"no adapter is called {request.adapter!r}: there is {there}")
        if request.sampling.num_samples > 1:
            raise InputError("a request is for one answer; several are several requests with other seeds")
        ticket = Ticket(request, max_new_tokens, self, deliver)
        with self._changed:
            if self._closed:
                raise RunError("the engine is closed")
            if self.max_waiting is not None and len(self._waiting) >= self.max_waiting:
                raise Full(f"{len(self._waiting)} requests wait already; ask again later")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Deliver no more of an answer; its slot is free from the next round on, a place among the waiting at once."""
        with self._changed:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Piece]]:
        """Answer some requests, whose number comes with each piece, in the caller's own thread.

        Raises:
            InputError, Full: see `submit`; then nothing was answered yet.
        """
        pieces: deque[tuple[int, Piece | Exception]] = deque()
        tickets = []
        try:
            for number, request in enumerate(requests):
                tickets.append(self.submit(request, lambda piece, number=number: pieces.append((number, piece))))
            left = True
            while left or pieces:
                if not pieces:
                    left = self.step()
                    continue
                number, piece = pieces.popleft()
                if isinstance(piece, Exception):
                    raise piece
                yield number, piece
        finally:  # whoever asked may have had enough
            for ticket in tickets:
                self.cancel(ticket)

    def close(self) -> None:
        """End `run` after the round under way; whoever has no whole answer yet is told."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    # --- in one thread

    def run(self) -> None:
        """Round after round until `close`."""
        while not self._closed:
            if not self.step():
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._waiting)
        left = [slot.ticket for slot in self._slots if slot.ticket is not None]
        for ticket in (*left, *self._waiting):
            self._deliver(ticket, RunError("the engine was closed"))

    @torch.inference_mode()
    def step(self) -> bool:
        """One round; false when nothing is left to do."""
        self._round += 1
        for slot in [slot for slot in self._slots if slot.ticket is not None and slot.ticket.cancelled]:
            self._release(slot)
        self._read_prompts()
        if self._running:
            self._decode()
        return bool(self.running or self._waiting)

    def _read_prompts(self) -> None:
        budget = PROMPT_TOKENS
        while budget > 0 and (self._reading is not None or self._admit()):
            slot = self._reading
            try:
                budget -= self._read(slot, budget)
            except Exception as error:  # whatever it is, others go on
                self._deliver(slot.ticket, error)
                slot.tokens = []
                self._release(slot)

    def _admit(self) -> bool:
        """Give the next one that waits a slot, if there are both."""
        free = [slot for slot in self._slots if slot.ticket is None]
        if not free:
            return False
        with self._changed:
            if not self._waiting:
                return False
            ticket = self._waiting.popleft()
        adapter, donor, known = ticket.request.adapter, None, 0
        if self._reuses:
            alike = [slot for slot in self._slots if slot.adapter == adapter and slot.tokens]
            donor = max(alike, key=lambda slot: shared_length(slot.tokens, ticket.prompt), default=None)
        if donor is not None:  # of the last token the logits are needed, so it is read in any case
            known = min(shared_length(donor.tokens, ticket.prompt), ticket.prompt_tokens - 1)
            known = self._cache.kept(known, donor.reached)
        if donor is not None and donor.ticket is None and 2 * known >= len(donor.tokens):
            slot = donor
        else:
            slot = min(free, key=lambda slot: slot.last_used)
            if known:
                to, of = self._slots.index(slot), self._slots.index(donor)
                columns = known if donor.reached <= self._cache.capacity else self._cache.capacity
                for tensor in self._cache.tensors():
                    tensor[to, :, :columns] = tensor[of, :, :columns]
        slot.row_state, slot.reached = (donor.row_state, donor.reached) if known else ({}, 0)
        slot.tokens, slot.adapter, slot.ticket = ticket.prompt[:known], adapter, ticket
        ticket.cached_tokens = known
        self._reading = slot
        return True

    def _read(self, slot: _Slot, most: int) -> int:
        """Read up to so many tokens of a prompt, and draw what follows it; returns how many were read."""
        clock = time.perf_counter()
        ticket, start = slot.ticket, len(slot.tokens)
        piece = ticket.prompt[start : start + most]
        cache = self._rows([slot], len(piece))
        cache.row_state = slot.row_state
        bank = getattr(self.model, "adapter_bank", None)
        with nullcontext() if bank is None else bank.using(ticket.request.adapter):
            if start + len(piece) < ticket.prompt_tokens:
                read_prompt(self.model, torch.tensor([piece], device=cache.device), cache)
                logits = None
            else:
                logits = next_logits(self.model, piece, cache)
        slot.tokens, slot.row_state, slot.last_used = slot.tokens + piece, cache.row_state, self._round
        slot.reached = max(slot.reached, len(slot.tokens))
        if logits is not None:
            self._only_tokens(logits)
            self._move(slot, self._running)
            self._reading = None
            self._running += 1
            if self._draw(ticket, logits, int(logits.argmax())):
                self._release(slot)
        self.speed.prompt_tokens += len(piece)
        self.speed.prefill_seconds += time.perf_counter() - clock
        return len(piece)

    def _decode(self) -> None:
        """One more token, or with guesses that are right a few, for every running row."""
        clock = time.perf_counter()
        rows = self._slots[: self._running]
        guesses = self._guess(rows)
        length = 1 + max(map(len, guesses))
        ids = [
            [slot.ticket.pending, *guess] + [0] * (length - 1 - len(guess))
            for slot, guess in zip(rows, guesses, strict=True)
        ]
        try:
            cache = self._rows(rows, length)
            logits = self._only_tokens(logits_of(self.model, torch.tensor(ids, device=cache.device), cache))
        except Exception as error:  # of memory, say: they end, and others may still fit
            for slot in rows:
                self._deliver(slot.ticket, error)
                slot.tokens = []
                self._release(slot)
            return
        likeliest = logits.argmax(dim=-1).tolist()
        drawn, finished = 0, []
        for row, (slot, guess) in enumerate(zip(rows, guesses, strict=True)):
            ticket = slot.ticket
            slot.last_used = self._round
            for at in range(1 + len(guess)):
                slot.tokens.append(ticket.pending)
                slot.reached = max(slot.reached, len(slot.tokens))
                try:
                    ended = self._draw(ticket, logits[row, at : at + 1], likeliest[row][at])
                except Exception as error:  # others go on
                    self._deliver(ticket, error)
                    ended = True
                drawn += 1
                if ended:
                    finished.append(slot)
                if ended or at == len(guess) or ticket.pending != guess[at]:
                    self.guessed_right += at
                    break
        for slot in finished:  # not before all rows know what they hold: rows move then
            self._release(slot)
        self.guessed += sum(map(len, guesses))
        self.speed.new_tokens += drawn
        self.speed.steps += 1
        self.speed.decode_seconds += time.perf_counter() - clock

    def _guess(self, rows: list[_Slot]) -> list[list[int]]:
        """For each row, tokens that may follow the pending one."""
        room = self.max_length - 1 - max(len(slot.tokens) for slot in rows)
        if self.make_drafter is None or len(rows) > DRAFT_ROWS or room < 1:
            return [[]] * len(rows)
        guesses = []
        for slot in rows:
            ticket, guess = slot.ticket, []
            most = min(DRAFT_TOKENS, room, ticket.max_new_tokens - ticket.new_tokens - 1)
            if most > 0 and ticket.drafter is not None:
                try:
                    guess = ticket.drafter([*slot.tokens, ticket.pending], most)
                except Exception as error:  # of memory, say: the answer comes without them
                    progress(f"no more guesses of an answer: {error}")
                    ticket.drafter = None
            none = (at for at, token_id in enumerate(guess) if token_id >= self.tokenizer.vocab_size)
            guesses.append(guess[: next(none, len(guess))])
        return guesses

    def _only_tokens(self, logits: Tensor) -> Tensor:
        """Logits (..., vocab), where rows of the head that are no token of the vocabulary are made impossible."""
        logits[..., self.tokenizer.vocab_size :] = float("-inf")
        return logits

    def _draw(self, ticket: Ticket, logits: Tensor, likeliest: int) -> bool:
        """Draw a token from logits (1, vocab) and deliver what it makes certain; whether the answer ends with it."""
        request, token_id = ticket.request, likeliest
        if not ticket.greedy:
            logits = logits.float()
            restricted = logits if ticket.choices is None else ticket.choices.restrict(logits)
            token_id = int(ticket.sampler.draw(restricted))
        ticket.pending = token_id
        if token_id in self.tokenizer.stop_ids:
            self._deliver(ticket, Piece(ticket.stream.flush(), finish_reason="stop"))
            return True
        ticket.new_tokens += 1
        logprobs = [] if request.logprobs is None else [self._logprob(logits[0], token_id, request.logprobs)]
        text, reason = ticket.stream.push(token_id), None
        if ticket.choices is not None:
            ticket.choices.push(token_id)
        if ticket.stream.finished or (ticket.choices is not None and ticket.choices.finished):
            reason = "stop"
        elif ticket.new_tokens == ticket.max_new_tokens:
            reason = "length"
        if reason is not None:
            text += ticket.stream.flush()
        self._deliver(ticket, Piece(text, 1, logprobs, reason))
        return reason is not None

    def _logprob(self, logits: Tensor, token_id: int, top: int) -> TokenLogprob:
        logprobs = logits.float().log_softmax(dim=-1)

        def named(token_id: int, *rest: tuple[TokenLogprob, ...]) -> TokenLogprob:
            data = self.tokenizer.bytes_of(token_id)
            text = self.tokenizer.special_text(token_id) or data.decode("utf-8", errors="replace")
            return TokenLogprob(token_id, text, data, logprobs[token_id].item(), *rest)

        likeliest = logprobs.topk(min(top, self.tokenizer.vocab_size)).indices.tolist()
        return named(token_id, tuple(map(named, likeliest)))

    def _deliver(self, ticket: Ticket, piece: Piece | Exception) -> None:
        if not ticket.cancelled:
            try:
                ticket.deliver(piece)
            except Exception:  # nobody is there any more to be told
                ticket.cancelled = True

    # --- rows of the cache

    def _rows(self, slots: list[_Slot], new: int) -> KVCache:
        """The rows of some slots, which lie beside each other, with memory for `new` more tokens each."""
        lengths = [len(slot.tokens) for slot in slots]
        self._cache.length = max(lengths)
        self._cache.reserve(new)
        first = self._slots.index(slots[0])
        rows = self._cache.rows(first, first + len(slots), lengths)
        states = [slot.row_state for slot in slots]
        rows.row_state = {name: torch.cat([state[name] for state in states]) for name in states[0]}
        return rows

    def _move(self, slot: _Slot, to: int) -> None:
        """Exchange a slot's row with another, of which only what is read is copied."""
        at = self._slots.index(slot)
        if at == to:
            return
        other = self._slots[to]
        length = max(len(slot.tokens), len(other.tokens))
        try:
            for tensor in self._cache.tensors():
                tensor[[at, to], :, :length] = tensor[[to, at], :, :length]
        except BaseException:  # some of both may be exchanged
            slot.tokens, other.tokens = [], []
            raise
        self._slots[at], self._slots[to] = other, slot

    def _release(self, slot: _Slot) -> None:
        """Free a slot; what it has read stays as a beginning for others."""
        if slot is self._reading:
            self._reading = None
        else:
            self._running -= 1
            self._move(slot, self._running)
        slot.ticket = None
