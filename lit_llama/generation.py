"""Text from a model: sampling, a batch of prompts through the KV cache, stops, streaming.

    prompts (ragged) -> prefill in chunks, padded on the left -> logits -> warp -> draw -> one token a row -> ...

`generate` and `generate_stream` know ids only; `stream_text` turns them into text and ends rows at stop strings;
`answer_questions` is the quiet batch version that evaluation and training probes use. Reading prompts, printing and
timing are `answering.py`.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_llama.compiled_decode import compiled_decoder
from lit_llama.config import CacheQuantization
from lit_llama.cpu_decode import cpu_decoder
from lit_llama.errors import InputError
from lit_llama.generation_arguments import SamplingConfig
from lit_llama.hardware import keep_freed_memory
from lit_llama.kv_cache import KVCache
from lit_llama.model import Llama
from lit_llama.packed_linear import pack_linear_layers
from lit_llama.prompts import Message, encode_chat, stop_strings, with_system
from lit_llama.tokenizer import Tokenizer

PREFILL_TOKENS = 2048
"""Prompt tokens of one forward pass, over all rows: enough for full GEMM speed, few enough to bound the activations."""
STEP_TOKENS = 4
"""So few tokens of a row are computed as steps of generation are, more of them as a prompt."""


GREEDY = SamplingConfig()


def generate(
    model: Llama,
    input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    sampling: SamplingConfig = GREEDY,
    stop_ids: Collection[int] = (),
    quantize_cache: CacheQuantization | None = None,
) -> list[list[int]]:
    """New tokens of each row; `num_samples` rows a prompt, those of one prompt together.

    Arguments and errors as in `generate_stream`.
    """
    prompts = as_prompts(input_ids)
    rows: list[list[int]] = [[] for _ in range(len(prompts) * sampling.num_samples)]
    for row, token_id in generate_stream(
        model, prompts, max_new_tokens, sampling, stop_ids, quantize_cache=quantize_cache
    ):
        rows[row].append(token_id)
    return rows


@dataclass
class Speed:
    """What a generation took, added up over calls; rates are tokens a second over all rows."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    """Until the first token of every row is known."""
    new_tokens: int = 0
    """After the first of each row."""
    steps: int = 0
    """Forward passes that made them: each reads all weights once."""
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0


@torch.inference_mode()
def generate_stream(
    model: Llama,
    input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    sampling: SamplingConfig = GREEDY,
    stop_ids: Collection[int] = (),
    ended: Callable[[int], bool] = lambda row: False,
    speed: Speed | None = None,
    quantize_cache: CacheQuantization | None = None,
) -> Iterator[tuple[int, int]]:
    """Generate token by token, all rows in step.

    A greedy row does not depend on its neighbours: on a CPU in bf16 bit for bit if all prompts are read in one pass,
    elsewhere up to the rounding of matrix products, whose kernel the library chooses by the number of rows.

    Args:
        model: in eval mode, with whatever wraps its layers.
        input_ids: prompts as a 1-D or 2-D tensor, one list of ids, or lists of different lengths.
        max_new_tokens: end of every row; by default the context that is left behind the longest prompt.
        sampling: how tokens are chosen.
        stop_ids: ids that end a row and are not part of it.
        ended: asked with a row's number after each of its tokens was yielded; true ends the row.
        speed: what this took is added to it.
        quantize_cache: how keys and values are stored, see `KVCache`.

    Yields:
        (row, token id), row = prompt * num_samples + sample.

    Raises:
        InputError: an empty prompt, an id outside of the vocabulary, or a prompt that with max_new_tokens exceeds the
            context.
    """
    speed = speed or Speed()
    prompts = as_prompts(input_ids)
    max_new_tokens = checked_length(model, prompts, max_new_tokens)
    clock = time.perf_counter()
    cache, logits = _prefill(model, prompts, max_new_tokens, quantize_cache)
    numbers = list(range(len(prompts) * sampling.num_samples))  # of the rows that the batch still has
    unfinished = set(numbers)
    sampler = Sampler(sampling, prompts, model.config.vocab_size, logits.device)
    logits = _select(model, [row // sampling.num_samples for row in numbers], logits, cache, sampler)

    for step in range(1, max_new_tokens + 1):
        tokens = sampler.draw(logits.float())
        drawn = tokens.tolist()  # waits for the device, once a step
        clock, seconds = time.perf_counter(), time.perf_counter() - clock
        if step == 1:
            speed.prompt_tokens += sum(map(len, prompts))
            speed.prefill_seconds += seconds
        else:
            speed.new_tokens += len(unfinished)
            speed.steps += 1
            speed.decode_seconds += seconds
        for row, token_id in zip(numbers, drawn, strict=False):  # the batch may end with a companion, see _select
            if row not in unfinished:
                continue
            if token_id in stop_ids:
                unfinished.remove(row)
                continue
            yield row, token_id
            if ended(row):
                unfinished.remove(row)
        if not unfinished or step == max_new_tokens:
            return
        if len(unfinished) <= len(numbers) // 2:  # finished rows go along until dropping them saves more than it copies
            kept = [index for index, row in enumerate(numbers) if row in unfinished]
            tokens = _select(model, kept, tokens, cache, sampler)
            numbers = [numbers[index] for index in kept]
        logits = logits_of(model, tokens[:, None], cache)[:, 0]


def prepare_to_generate(model: Llama, compile: bool = False) -> None:
    """Make generation as fast as it can be on the model's device; the model can then do nothing else.

    On a CPU `cpu_decode.py` computes the steps. Where that does not apply, the weights are packed for them, or, if
    `compile` says so, the steps compiled (`compiled_decode.py`), which takes a while the first time.
    """
    if model.model.norm.weight.device.type == "cpu":
        keep_freed_memory()  # a prompt asks for megabytes at every product
    model.decoder = cpu_decoder(model)
    if model.decoder is None and compile:
        model.decoder = compiled_decoder(model)
    if model.decoder is None:
        pack_linear_layers(model)


def logits_of(model: Llama, tokens: Tensor, cache: KVCache) -> Tensor:
    """Logits (rows, length, vocab) after each of a few tokens (rows, length), which the cache then holds."""
    if model.decoder is not None:
        return model.decoder(tokens, cache)
    return model.lm_head(model.model(tokens, cache=cache))


def read_prompt(model: Llama, tokens: Tensor, cache: KVCache) -> Tensor:
    """Hidden states (rows, hidden) of the last of many tokens (rows, length), which the cache then holds."""
    return model.model(tokens, cache=cache)[:, -1] if model.decoder is None else model.decoder.read(tokens, cache)


def next_logits(model: Llama, tokens: Sequence[int], cache: KVCache) -> Tensor:
    """Logits (1, vocab) of what follows a row of tokens, which its cache then holds."""
    ids = torch.tensor([tokens], device=model.model.norm.weight.device)
    if cache.length and len(tokens) <= STEP_TOKENS:
        return logits_of(model, ids, cache)[:, -1]
    return model.lm_head(_accompanied(read_prompt(model, ids, cache)))[:1]


def _select(model: Llama, rows: list[int], tensor: Tensor, cache: KVCache, sampler: "Sampler") -> Tensor:
    """Let everything that has a row for each row of the batch go on with `rows` of it; returns those of `tensor`.

    On a CPU without decoder a single row gets itself for companion, see `_accompanied`.
    """
    if len(rows) == 1 and tensor.device.type == "cpu" and model.decoder is None:
        rows = rows * 2
    if rows == list(range(len(tensor))):
        return tensor
    index = torch.tensor(rows, device=tensor.device)
    cache.select(index)
    sampler.select(index)
    return tensor[index]


def as_prompts(input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as lists of ids, whatever form they came in."""
    if isinstance(input_ids, Tensor):
        input_ids = input_ids.tolist()
    input_ids = [row.tolist() if isinstance(row, Tensor) else row for row in input_ids]
    if input_ids and isinstance(input_ids[0], int):
        input_ids = [input_ids]
    return [list(row) for row in input_ids]


def checked_length(
    model: Llama, prompts: list[list[int]], max_new_tokens: int | None, context: int | None = None
) -> int:
    """The number of tokens to generate at most, after every check of what the caller gave.

    Args:
        context: most tokens of a prompt and what follows it, where they are fewer than the model's.
    """
    if not prompts:
        raise InputError("no prompt was given")
    vocab_size, context = model.config.vocab_size, context or model.config.max_position_embeddings
    for number, prompt in enumerate(prompts, start=1):
        of = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise InputError(f"{of} is empty; give it at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise InputError(f"{of} has ids outside of the model's vocabulary of {vocab_size}")
        if len(prompt) >= context:
            raise InputError(
                f"{of} has {len(prompt)} tokens and leaves no room in the model's context of {context}; shorten it"
            )
        if max_new_tokens is not None and len(prompt) + max_new_tokens > context:
            raise InputError(
                f"{of} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} that exceeds"
                f" the model's context of {context}"
            )
    if max_new_tokens is None:
        return context - max(map(len, prompts))
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} must be at least 1")
    return max_new_tokens


def _accompanied(rows: Tensor) -> Tensor:
    """A single row on a CPU with itself for companion.

    The products of one row run in another kernel than those of several, with other last bits, and two rows take hardly
    longer than one: reading the weights is what takes time.
    """
    return rows.expand(2, -1) if len(rows) == 1 and rows.device.type == "cpu" else rows


def _prefill(
    model: Llama, prompts: list[list[int]], max_new_tokens: int, quantize_cache: CacheQuantization | None
) -> tuple[KVCache, Tensor]:
    """The cache after the prompts, and the logits of what follows each, (rows, vocab)."""
    weight = model.model.norm.weight
    width = max(map(len, prompts))
    padding = None
    if min(map(len, prompts)) < width:
        padding = torch.tensor([width - len(prompt) for prompt in prompts], device=weight.device)
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=weight.device)
    if padded.numel() == 1:
        padded = _accompanied(padded)
    # The last token needs no place: nothing is computed after it.
    length = width + max_new_tokens - 1
    cache = KVCache(model.config, len(padded), length, weight.dtype, weight.device, padding, quantize_cache)
    for chunk in padded.chunk(-(-padded.numel() // PREFILL_TOKENS), dim=1):  # of like size: none of a token alone
        hidden = read_prompt(model, chunk, cache)
    return cache, model.lm_head(_accompanied(hidden))[: len(prompts)]


class Sampler:
    """Chooses the next token of each row."""

    def __init__(
        self, config: SamplingConfig, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device
    ) -> None:
        self.config = config
        self.generator = torch.Generator(device).manual_seed(config.seed)  # the caller's random state is its own
        self.seen: Tensor | None = None
        """(rows, vocab) bool: tokens that the repetition penalty touches."""
        if config.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for seen, prompt in zip(self.seen, prompts, strict=True):
                seen[torch.tensor(prompt, device=device)] = True

    def draw(self, logits: Tensor) -> Tensor:
        """Token ids (rows,) int64 from fp32 logits (rows, vocab)."""
        if self.seen is not None:
            logits = penalize_repetition(logits, self.seen, self.config.repetition_penalty)
        if self.config.temperature == 0:
            tokens = logits.argmax(dim=-1)
        else:
            # The largest is 0 whatever the temperature is: a tiny one divides none to infinity.
            logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.config.temperature
            logits = filter_logits(logits, self.config.top_k, self.config.top_p, self.config.min_p)
            # The largest of p / Exponential(1) is a draw from p: no host is asked and nothing is summed up.
            noise = torch.empty_like(logits).exponential_(generator=self.generator)
            tokens = (torch.softmax(logits, dim=-1) / noise).argmax(dim=-1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        if self.seen is not None:
            self.seen = self.seen[rows]


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (rows, vocab) with those of seen tokens made less likely; `seen` is a mask of the same shape."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    """Logits (rows, vocab) with -inf for the tokens that the filters exclude, in this order; None is off."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1)
        excluded = torch.softmax(ordered, dim=-1).cumsum(dim=-1) <= 1 - top_p
        excluded[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(excluded).scatter_(1, order, excluded), float("-inf"))
    if min_p is not None and min_p > 0:
        probabilities = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), float("-inf"))
    return logits


class TextStream:
    """Text of ids as they come, up to a stop string; what may yet become one is held back.

    Args:
        continuation: see `Tokenizer.stream`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), continuation: bool = False) -> None:
        if "" in stop:
            raise InputError("an empty stop string would end every answer at once")
        self.decoder = tokenizer.stream(continuation)
        self.stop = stop
        self.held = ""
        self.finished = False
        """A stop string was met; nothing more comes."""

    def push(self, token_id: int) -> str:
        """The text that one more id makes certain."""
        return self._release(self.decoder.push(token_id))

    def flush(self) -> str:
        """What is left when no id follows."""
        text = self._release(self.decoder.flush()) + self.held
        self.held = ""
        return text

    def _release(self, text: str) -> str:
        if self.finished:
            return ""
        self.held += text
        found = [at for at in map(self.held.find, self.stop) if at >= 0]
        if found:
            self.finished = True
            certain, self.held = self.held[: min(found)], ""
            return certain
        longest = max(map(len, self.stop), default=1)
        for at in range(max(0, len(self.held) - longest + 1), len(self.held)):
            if any(stop.startswith(self.held[at:]) for stop in self.stop):
                certain, self.held = self.held[:at], self.held[at:]
                return certain
        certain, self.held = self.held, ""
        return certain


def stream_text(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    sampling: SamplingConfig = GREEDY,
    stop: Sequence[str] = (),
    speed: Speed | None = None,
) -> Iterator[tuple[int, str]]:
    """Answers as text, piece by piece: whole characters, no special token, nothing of a stop string.

    Args:
        prompts: ids of each prompt, of any lengths.
        stop: strings that end an answer, besides the tokenizer's `stop_ids`.
        speed: what this took is added to it.

    Yields:
        (row, text), text never empty; row = prompt * num_samples + sample.
    """
    streams = [TextStream(tokenizer, stop) for _ in range(len(prompts) * sampling.num_samples)]
    tokens = generate_stream(
        model, prompts, max_new_tokens, sampling, tokenizer.stop_ids, lambda row: streams[row].finished, speed
    )
    for row, token_id in tokens:
        if text := streams[row].push(token_id):
            yield row, text
    for row, stream in enumerate(streams):
        if text := stream.flush():
            yield row, text


def answer_questions(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[str | Sequence[Message]],
    style: str,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    system: str | None = None,
    adapters: Sequence[str | None] | None = None,
) -> list[str]:
    """Greedy answers, in the order of the questions, cut at the style's stop and stripped of surrounding white space.

    The model's mode, its gradients and the random state are afterwards as they were.

    Args:
        questions: what the user says, or a whole conversation that ends with it.
        style: prompt style, one of `prompts.STYLES`.
        batch_size: questions answered at a time; those of like length go together.
        system: system message of those whose conversation has none.
        adapters: of `model.adapter_bank`, the one that answers each question; None: whichever is selected for all.

    Raises:
        InputError: unknown style, or a question that with max_new_tokens exceeds the context.
    """
    prompts = [encode_question(tokenizer, style, question, system) for question in questions]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    stop = stop_strings(style)
    answers = [""] * len(prompts)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = [prompts[number] for number in numbers]
            own = adapters and model.adapter_bank.using([adapters[number] for number in numbers])
            with own or nullcontext():
                for row, text in stream_text(model, tokenizer, batch, max_new_tokens, stop=stop):
                    answers[numbers[row]] += text
    return [answer.strip() for answer in answers]


def encode_question(
    tokenizer: Tokenizer, style: str, question: str | Sequence[Message], system: str | None = None
) -> list[int]:
    """Ids of a question, as what the user says or as a conversation that ends with it, and of what opens the answer.

    Args:
        system: as in `prompts.with_system`.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return encode_chat(tokenizer, style, with_system(tokenizer, style, messages, system))


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a while; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
