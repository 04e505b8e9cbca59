"""From the body of a request to what the engine is asked, and from its pieces to OpenAI's answers and chunks.

The bodies are `server_schema.py`, the routes and what is refused before that `server_app.py`.
"""

import asyncio
import json
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, count
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lit_llama.batching import Engine, Full, Piece, Request, Ticket, TokenLogprob
from lit_llama.choices import ChoiceTree
from lit_llama.errors import InputError, RunError
from lit_llama.generation import SamplingConfig, encode_question
from lit_llama.prompts import encode_chat, stop_strings
from lit_llama.server_schema import ChatRequest, CompletionRequest, SamplingBody

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
"""Upper bounds of the histograms' buckets."""
RETRY_SOON = {"Retry-After": "1"}
FAILED = "the server failed; its log says why"


class ApiError(Exception):
    """An answer that is an error of OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ClientGone(Exception):
    """Whoever asked has closed the connection."""


class Form(NamedTuple):
    """How questions to a model are dressed."""

    adapter: str | None
    style: str
    system: str | None


class Metrics:
    """What GET /metrics reports."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        kept = {"registry": self.registry, "namespace": "lit_llama"}
        self.requests = Counter("requests", "HTTP requests by route and status.", ["route", "status"], **kept)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **kept)
        self.cached_tokens = Counter("cached_tokens", "Tokens of prompts that needed no reading.", **kept)
        self.completion_tokens = Counter("completion_tokens", "Tokens of answers.", **kept)
        Gauge("running", "Answers under way.", **kept).set_function(lambda: engine.running)
        Gauge("waiting", "Answers that wait for a slot.", **kept).set_function(lambda: engine.waiting)
        Gauge("guessed", "Tokens guessed with --draft.", **kept).set_function(lambda: engine.guessed)
        Gauge("guessed_right", "Of them right.", **kept).set_function(lambda: engine.guessed_right)
        self.first = Histogram("time_to_first_token_seconds", "Waiting included.", buckets=SECONDS, **kept)
        self.gap = Histogram("time_per_token_seconds", "After the first.", buckets=SECONDS, **kept)


@dataclass
class Service:
    """What all requests share."""

    engine: Engine
    forms: dict[str, Form]
    """By the name of a model."""
    defaults: SamplingConfig
    max_new_tokens: int
    """Longest answer."""
    timeout: float
    """Seconds that a request may take."""
    api_key: str | None = None
    max_body_bytes: int = 10**6
    hosts: Sequence[str] | None = None
    """Names that it answers to without a token; None: any."""
    started: int = field(default_factory=lambda: int(time.time()))
    queues: set[asyncio.Queue] = field(default_factory=set)
    """Of the requests under way."""

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        self._number = count()

    def end_all(self) -> None:
        """End all requests under way with an error."""
        for queue in self.queues:
            queue.put_nowait((0, ApiError(503, "the server is shutting down; the answer so far is all there is")))

    def form(self, model: str) -> Form:
        if model not in self.forms:
            there = ", ".join(self.forms)
            raise ApiError(404, f"no model is called {model!r}: there are {there}", "model_not_found", "model")
        return self.forms[model]

    def chat_requests(self, body: ChatRequest) -> list[Request]:
        """What the engine is asked for a conversation."""
        form = self.form(body.model)
        roles = {"developer": "system"}
        messages = [{"role": roles.get(turn.role, turn.role), "content": turn.text} for turn in body.messages]
        ids = encode_question(self.engine.tokenizer, form.style, messages, form.system)
        most = body.max_completion_tokens or body.max_tokens
        logprobs = 0 if body.logprobs and body.top_logprobs is None else body.top_logprobs
        return self._requests(body, [ids], most, stop_strings(form.style), logprobs)

    def completion_requests(self, body: CompletionRequest) -> list[Request]:
        """What the engine is asked for texts to go on with."""
        self.form(body.model)
        prompts = [body.prompt] if isinstance(body.prompt, str) or is_ids(body.prompt) else body.prompt
        tokenizer = self.engine.tokenizer
        ids = [
            encode_chat(tokenizer, "plain", [{"role": "user", "content": prompt}])
            if isinstance(prompt, str)
            else prompt
            for prompt in prompts
        ]
        return self._requests(body, ids, body.max_tokens, [], body.logprobs, continuation=True)

    def _requests(
        self,
        body: SamplingBody,
        prompts: list[list[int]],
        most: int | None,
        stop: list[str],
        logprobs: int | None,
        continuation: bool = False,
    ) -> list[Request]:
        samples = body.n or 1
        limit = self.engine.max_waiting
        if limit is not None and len(prompts) * samples > limit:
            raise ApiError(400, f"{len(prompts) * samples} answers in one request; at most {limit} can be asked for")
        if most is not None and most > self.max_new_tokens:
            raise ApiError(
                400, f"max_tokens {most} is above this server's limit of {self.max_new_tokens}", param="max_tokens"
            )
        context = self.engine.max_length
        for number, prompt in enumerate(prompts):
            room = context - len(prompt)
            if room < (most or 1):
                asked = "" if most is None else f" and max_tokens is {most}"
                raise ApiError(
                    400,
                    f"the context is {context} tokens; prompt {number} has {len(prompt)}{asked}",
                    "context_length_exceeded",
                    "messages" if isinstance(body, ChatRequest) else "prompt",
                )
        most_tokens = [most or min(self.max_new_tokens, context - len(prompt)) for prompt in prompts]
        choices = None
        if body.choices:
            choices = ChoiceTree(self.engine.tokenizer, list(dict.fromkeys(body.choices)))
            if choices.longest > min(most_tokens):
                message = f"a choice has {choices.longest} tokens, and the answer at most {min(most_tokens)}"
                raise ApiError(400, message, param="choices")
        stop = stop + ([body.stop] if isinstance(body.stop, str) else body.stop or [])
        names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
        chosen = {name: getattr(self.defaults if getattr(body, name) is None else body, name) for name in names}
        # Asking again draws again, unless the request names its seed.
        seed = self.defaults.seed + next(self._number) if body.seed is None else body.seed
        return [
            Request(
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                sampling=SamplingConfig(**chosen, seed=(seed + sample) % 2**63),
                stop=stop,
                adapter=self.forms[body.model].adapter,
                choices=choices,
                continuation=continuation,
                logprobs=logprobs,
            )
            for prompt, max_new_tokens in zip(prompts, most_tokens, strict=True)
            for sample in range(samples)
        ]


def is_ids(prompt: Sequence[Any]) -> bool:
    return all(isinstance(item, int) for item in prompt)


class Answers:
    """The answers to one HTTP request, while it lasts; leaving it frees the slots of those that are not complete.

    Args:
        requests: of the engine, one for each answer.
        samples: answers to each prompt; those of one prompt follow each other.
        receive: of the ASGI connection; what tells that the client has gone.
    """

    def __init__(
        self, service: Service, requests: list[Request], samples: int, receive: Callable[[], Awaitable[dict]]
    ) -> None:
        self.service, self.requests, self.samples = service, requests, samples
        self.tickets: list[Ticket] = []
        self.new_tokens = 0
        self._receive = receive
        self._queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def __aenter__(self) -> "Answers":
        """Raises ApiError when the engine takes no more, or not this."""
        loop = asyncio.get_running_loop()
        self._began = loop.time()

        def deliver(index: int, piece: Piece | Exception) -> None:  # in the engine's thread
            loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        try:
            for index, request in enumerate(self.requests):
                self.tickets.append(self.service.engine.submit(request, partial(deliver, index)))
        except Exception as error:
            self._cancel()
            raise as_api_error(error) from error
        self._watcher = asyncio.create_task(self._watch())
        self.service.queues.add(self._queue)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._watcher.cancel()
        self.service.queues.discard(self._queue)
        self._cancel()
        usage, metrics = self.usage(), self.service.metrics
        metrics.prompt_tokens.inc(usage["prompt_tokens"])
        metrics.cached_tokens.inc(usage["prompt_tokens_details"]["cached_tokens"])
        metrics.completion_tokens.inc(usage["completion_tokens"])

    def usage(self) -> dict[str, Any]:
        """Tokens so far; a prompt counts once, however many answers it gets."""
        first = self.tickets[:: self.samples]
        prompt_tokens = sum(ticket.prompt_tokens for ticket in first)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(ticket.cached_tokens for ticket in first)},
        }

    def _cancel(self) -> None:
        for ticket in self.tickets:
            self.service.engine.cancel(ticket)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait((0, ClientGone()))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the answer, piece of it), until all are complete.

        Raises:
            ApiError: the time is up, the server ends, or the engine has failed.
            ClientGone: nobody listens any more.
        """
        loop, metrics = asyncio.get_running_loop(), self.service.metrics
        deadline = self._began + self.service.timeout
        last: dict[int, float] = {}
        unfinished = len(self.requests)
        while unfinished:
            try:
                async with asyncio.timeout_at(deadline):
                    index, piece = await self._queue.get()
            except TimeoutError:
                message = f"the answer took longer than the {self.service.timeout:g} seconds that a request may take"
                # The official client would otherwise ask the same again at once.
                raise ApiError(504, message, "timeout", headers={"x-should-retry": "false"}) from None
            if isinstance(piece, Exception):
                raise as_api_error(piece)
            if piece.new_tokens:
                now = loop.time()
                if index in last:
                    metrics.gap.observe((now - last[index]) / piece.new_tokens)
                else:
                    metrics.first.observe(now - self._began)
                last[index] = now
                self.new_tokens += piece.new_tokens
            unfinished -= piece.finish_reason is not None
            yield index, piece


def as_api_error(error: Exception) -> Exception:
    """What the engine raised, as what the client is told."""
    if isinstance(error, Full):
        return ApiError(429, "too many requests wait already; ask again later", "rate_limit_exceeded", None, RETRY_SOON)
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, RunError):
        return ApiError(503, str(error))
    return error


async def whole_answer(answers: Answers, chat: bool, header: dict[str, Any]) -> dict[str, Any]:
    """A ChatCompletion or Completion."""
    async with answers:
        texts, reasons = [""] * len(answers.requests), [""] * len(answers.requests)
        logprobs: list[list[TokenLogprob]] = [[] for _ in answers.requests]
        async for index, piece in answers.pieces():
            texts[index] += piece.text
            logprobs[index] += piece.logprobs
            reasons[index] = piece.finish_reason or ""
        choices = []
        for index, (request, text) in enumerate(zip(answers.requests, texts, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            listed = None if request.logprobs is None else as_logprobs(logprobs[index], chat, request.logprobs)
            choices.append({"index": index, **said, "logprobs": listed, "finish_reason": reasons[index]})
        return {**header, "choices": choices, "usage": answers.usage()}


async def events(answers: Answers, chat: bool, header: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of ChatChunks or CompletionChunks; what goes wrong after the first is an event too.

    The first is "": once it is there, the engine has taken the request.
    """

    def chunk(index: int, said: dict[str, Any], logprobs: dict | None = None, reason: str | None = None) -> str:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        return event({**header, "choices": [choice], **no_usage})

    no_usage = {"usage": None} if with_usage else {}
    offsets = [0] * len(answers.requests)
    async with answers:
        yield ""
        if chat:
            for index in range(len(answers.requests)):
                yield chunk(index, {"delta": {"role": "assistant", "content": ""}})
        try:
            async for index, piece in answers.pieces():
                logprobs = None
                if piece.logprobs:
                    logprobs = as_logprobs(piece.logprobs, chat, answers.requests[index].logprobs, offsets[index])
                    offsets[index] += sum(len(token.text) for token in piece.logprobs)
                said = {"delta": {"content": piece.text} if piece.text else {}} if chat else {"text": piece.text}
                if piece.text or logprobs or piece.finish_reason:
                    yield chunk(index, said, logprobs, piece.finish_reason)
            if with_usage:
                yield event({**header, "choices": [], "usage": answers.usage()})
        except ClientGone:
            return
        except ApiError as error:
            yield event(error.body)
        except Exception:  # the status has been sent
            traceback.print_exc()
            yield event(ApiError(500, FAILED).body)
        yield "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def header_of(chat: bool, stream: bool, model: str) -> dict[str, Any]:
    """What an answer and each of its chunks begin with."""
    kind = ("chat.completion.chunk" if stream else "chat.completion") if chat else "text_completion"
    prefix = "chatcmpl" if chat else "cmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def as_logprobs(tokens: Sequence[TokenLogprob], chat: bool, top: int, offset: int = 0) -> dict[str, Any]:
    """Log-probabilities as chat completions or completions have them; `offset` is that of the first token's text."""
    if chat:
        return {
            "content": [{**as_logprob(token), "top_logprobs": list(map(as_logprob, token.top))} for token in tokens]
        }
    starts = accumulate((len(token.text) for token in tokens), initial=offset)
    return {
        "tokens": [spelled(token) for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [{spelled(other): finite(other.logprob) for other in token.top} for token in tokens],
        "text_offset": list(starts)[:-1],
    }


def as_logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"token": spelled(token), "logprob": finite(token.logprob), "bytes": list(token.bytes)}


def spelled(token: TokenLogprob) -> str:
    """The text of a token; its bytes, as OpenAI writes them, where it is part of a character."""
    try:
        token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
    return token.text


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes this for impossible tokens."""
    return max(logprob, -9999.0)
