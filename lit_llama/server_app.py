"""The HTTP application: routes, who may ask, limits of a request, errors of OpenAI's shape.

What a body may hold is `server_schema.py`, how it is answered `server_answers.py`, how the server starts and ends
`server.py`.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import math
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from http import HTTPStatus
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import generate_latest
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_llama.command_line import progress
from lit_llama.errors import InputError
from lit_llama.server_answers import (
    FAILED,
    Answers,
    ApiError,
    ClientGone,
    Service,
    as_api_error,
    events,
    header_of,
    whole_answer,
)
from lit_llama.server_schema import (
    NOT_IMPLEMENTED,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionChunk,
    CompletionRequest,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
)

OPEN_PATHS = ("/", "/health")
"""For anybody: they tell nothing that was asked or answered."""
BODY_PATHS = ("/v1/chat/completions", "/v1/completions")
REFERENCE = "#/components/schemas/{model}"


def make_app(service: Service) -> FastAPI:
    """The application for a service."""
    app = FastAPI(
        title="lit-llama", description="A base model and its experts over HTTP.", docs_url=None, redoc_url=None
    )
    app.add_middleware(Gate, service=service)
    for kind in (ApiError, InputError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    token = [Depends(HTTPBearer(auto_error=False))] if service.api_key else []  # the gate checks it; this describes it
    page, policy = read_page()

    async def answer(body: ChatRequest | CompletionRequest, request: Request) -> Any:
        chat = isinstance(body, ChatRequest)
        make = service.chat_requests if chat else service.completion_requests
        requests = await asyncio.to_thread(make, body)  # long prompts take a while to tokenize
        answers = Answers(service, requests, body.n or 1, request.receive)
        header = header_of(chat, bool(body.stream), body.model)
        if not body.stream:
            return await whole_answer(answers, chat, header)
        stream = events(answers, chat, header, bool(body.stream_options and body.stream_options.include_usage))
        await anext(stream)  # what is wrong with the request is an error with a status of its own
        return EventStream(stream)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=described(ChatChunk, 400, 404, 408, 413, 415, 429, 503, 504),
        dependencies=token,
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation."""
        return await answer(body, request)

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=described(CompletionChunk, 400, 404, 408, 413, 415, 429, 503, 504),
        dependencies=token,
    )
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """Go on with texts as they stand."""
        return await answer(body, request)

    def card(name: str) -> ModelCard:
        return ModelCard(id=name, created=service.started, owned_by="lit-llama")

    @app.get("/v1/models", responses=described(), dependencies=token)
    async def models() -> ModelList:
        """The base and every adapter."""
        return ModelList(data=[card(name) for name in service.forms])

    @app.get("/v1/models/{model}", responses=described(None, 404), dependencies=token)
    async def model(model: str) -> ModelCard:
        service.form(model)
        return card(model)

    @app.get("/health", responses=described())
    async def health() -> Health:
        return Health(status="ok", models=list(service.forms))

    @app.get("/metrics", response_class=PlainTextResponse, responses=described(), dependencies=token)
    async def metrics() -> PlainTextResponse:
        """In the text format of Prometheus."""
        return PlainTextResponse(generate_latest(service.metrics.registry))

    @app.get("/", response_class=HTMLResponse, responses=described())
    async def index() -> HTMLResponse:
        """The page to ask the base and an expert side by side."""
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    app.openapi = partial(describe, app)
    return app


def described(chunk: type[BaseModel] | None = None, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of a route besides its own, for the description at /openapi.json."""
    error = {"content": {"application/json": {"schema": {"$ref": REFERENCE.format(model=ErrorBody.__name__)}}}}
    described = {401: error | {"description": "No valid token"}, 403: error | {"description": "A foreign host name"}}
    described |= {status: error | {"description": HTTPStatus(status).phrase} for status in statuses}
    described["default"] = error | {"description": "Any other failure"}
    if chunk is not None:
        parts = [{"$ref": REFERENCE.format(model=model.__name__)} for model in (chunk, ErrorBody)]
        json_parts = [{"contentMediaType": "application/json", "contentSchema": part} for part in parts]
        data = {"type": "string", "anyOf": [*json_parts, {"const": "[DONE]", "description": "the last"}]}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content = {"text/event-stream": {"schema": event}}
        described[200] = {"description": "The answer, or a stream of its parts", "content": content}
    return described


def describe(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with the models that only `described` names."""
    description = FastAPI.openapi(app)
    models = [(model, "serialization") for model in (ErrorBody, ChatChunk, CompletionChunk)]
    description["components"]["schemas"] |= models_json_schema(models, ref_template=REFERENCE)[1]["$defs"]
    return description


class HttpServer(uvicorn.Server):
    """Says where it listens, and ends in two steps: no new requests, and after `grace` seconds none at all."""

    def __init__(self, service: Service, grace: float) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service),
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=math.ceil(grace) + 5,  # in which clients are told of their end
            )
        )
        self.service, self.grace = service, grace

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):  # and it is no failure to end by them
            signal.signal(number, self.handle_exit)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        progress(f"{', '.join(self.service.forms)} at http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self.grace, self.service.end_all)
        await super().shutdown(sockets)


class EventStream(Response):
    """Server-sent events; their generator is closed however the connection ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})


class Gate:
    """In front of the application: counts, checks token, host and kind, and reads the body up to its limit."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # as nginx counts clients that went away before an answer

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        try:
            self.check(scope)
            if takes_body(scope):
                receive = replaying(await self.read_body(scope, receive), receive)
            await self.app(scope, receive, counted_send)
        except ApiError as error:
            await error_response(error)(scope, receive, counted_send)
        except ClientGone:
            pass
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.requests.labels(route, status).inc()

    def check(self, scope: Scope) -> None:
        """Raises ApiError where a request is not even to be read."""
        service = self.service
        if service.api_key is not None:
            scheme, _, given = only_header(scope, b"authorization").partition(b" ")
            right = hmac.compare_digest(given.strip(), service.api_key.encode())
            if scope["path"] not in OPEN_PATHS and (scheme.lower() != b"bearer" or not right):
                raise ApiError(
                    401, "no valid token: send Authorization: Bearer TOKEN", "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        elif service.hosts is not None:
            # A page of anybody's may have its own name resolve to this machine: the browser would let it read answers.
            host = only_header(scope, b"host").decode("latin-1")
            if host and host_name(host) not in service.hosts:
                raise ApiError(403, f"without a token this server answers to {', '.join(service.hosts)} only", "host")
        if takes_body(scope):
            kind = only_header(scope, b"content-type").partition(b";")[0].strip().lower()
            if kind != b"application/json":  # which no foreign page can send without asking first
                raise ApiError(415, "the body must be JSON: send Content-Type: application/json")

    async def read_body(self, scope: Scope, receive: Receive) -> bytes:
        limit, body = self.service.max_body_bytes, bytearray()
        declared = only_header(scope, b"content-length")
        too_long = ApiError(413, f"the body is longer than the {limit:,} bytes that this server reads")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise too_long
        try:
            async with asyncio.timeout(self.service.timeout):
                while (message := await receive())["type"] == "http.request":
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_long
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, "the body did not come in time") from None
        raise ClientGone


def takes_body(scope: Scope) -> bool:
    return scope["method"] == "POST" and scope["path"] in BODY_PATHS


def only_header(scope: Scope, name: bytes) -> bytes:
    """The value of a header; of one that is missing or there twice, nothing."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[0] if len(values) == 1 else b""


def host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def replaying(body: bytes, receive: Receive) -> Receive:
    """A receive that first gives a body that was read already."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


async def answer_error(request: Request, error: Exception) -> Response:
    """Any error as one of OpenAI's shape."""
    if isinstance(error, RequestValidationError):
        error = validation_error(error.errors())
    elif isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    error = as_api_error(error)
    if not isinstance(error, ApiError):
        error = ApiError(500, FAILED)
    return error_response(error)


def error_response(error: ApiError) -> Response:
    # Escapes keep what is no valid Unicode, such as a field's name, out of the bytes.
    return Response(json.dumps(error.body), error.status, error.headers, media_type="application/json")


def validation_error(errors: list[dict[str, Any]]) -> ApiError:
    """The first of pydantic's errors, in a line."""
    first = errors[0]
    place = [part for part in first["loc"] if part != "body"]
    param = str(place[0]) if place else None
    what = ".".join(map(str, place))[:200]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "extra_forbidden":
        message = f"{what}: this server has no such field; leave it out"
    elif NOT_IMPLEMENTED.intersection(place):
        message = f"{what}: not implemented by this server beyond its default; leave it out"
    elif param == "prompt":
        message = "prompt: must be a text, a list of token ids, or a list of either, none of them empty"
    else:
        message = f"{what or 'the body'}: {first['msg'].removeprefix('Value error, ')}"
    return ApiError(400, message, param=param)


def read_page() -> tuple[str, str]:
    """The page, and a Content-Security-Policy that allows what is in it and requests to this server."""
    html = files("lit_llama").joinpath("server_page.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return html, (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
