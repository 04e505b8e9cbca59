"""generate/serve.py as its clients meet it: the official one, raw sockets, requests made up from its description."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import openai
import pytest
import torch
from conftest import ROOT, run_script, warm_python, write_adapters

from lit_llama.batching import Piece
from lit_llama.checkpoint import load_model
from lit_llama.errors import InputError
from lit_llama.generation import answer_questions
from lit_llama.lora import load_adapter
from lit_llama.server import ServeArguments, serve
from lit_llama.server_answers import events, header_of
from lit_llama.tokenizer import Tokenizer

MODELS = ("base", "law", "tax")
QUESTION = [{"role": "user", "content": "Who pays?"}]
SYSTEM = "Answer like a judge."


@pytest.fixture(scope="module")
def experts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_adapters(tiny_checkpoint, tmp_path_factory.mktemp("experts"), "law", "tax")
    (directory / "tax/lit_config.yaml").write_text(f"eval: {{probe_style: chatml, probe_system: {SYSTEM}}}\n")
    return directory


@contextmanager
def serving(
    checkpoint: Path, *options: object, **environment: str
) -> Iterator[tuple[str, subprocess.Popen, list[str]]]:
    """A server on a free port: its address, its process, and what it says on stderr, line by line."""
    command = [
        warm_python(),
        "generate/serve.py",
        "--checkpoint_dir",
        checkpoint,
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [*map(str, command), "--port", "0", *map(str, options)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://\S+", line):
                break
        else:
            raise AssertionError(f"the server did not start: {''.join(said)}")
        reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
        reader.start()
        yield found[0], process, said
        process.terminate()
        assert process.wait(30) == 0, said
        reader.join()
        assert not any("Traceback" in line for line in said), "".join(said)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, experts: Path) -> Iterator[str]:
    options = ("--adapters_dir", experts, "--max_new_tokens", 400, "--slots", 4, "--max_waiting", 8)
    with serving(tiny_checkpoint, *options) as (url, _, _):
        yield url


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, experts: Path) -> dict[str, str]:
    """What each model answers when it is asked alone, by the code that training probes use."""
    tokenizer, answers = Tokenizer.from_checkpoint(tiny_checkpoint), {}
    for name in MODELS:
        model = load_model(tiny_checkpoint, torch.float32).eval()
        if name != "base":
            load_adapter(model, experts / name)
        system = SYSTEM if name == "tax" else None
        (answers[name],) = answer_questions(model, tokenizer, [QUESTION], "chatml", max_new_tokens=12, system=system)
    assert len(set(answers.values())) == 3
    return answers


def ask(url: str, path: str, body: object, headers: dict[str, str] | None = None) -> tuple[int, dict]:
    """POST a body, bytes as they stand and anything else as JSON; status and the JSON of the answer."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def metric(url: str, name: str) -> float:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"lit_llama_{name}[ {{]", line))


def until(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


# --- the official client


def test_every_model_answers_as_it_does_alone(client: openai.OpenAI, expected: dict[str, str]) -> None:
    assert [model.id for model in client.models.list()] == list(MODELS)
    assert client.models.retrieve("law").id == "law"
    for name in MODELS:
        answer = client.chat.completions.create(model=name, messages=QUESTION, max_tokens=12)
        (choice,) = answer.choices
        assert choice.message.content.strip() == expected[name] and answer.model == name
        assert choice.finish_reason in ("stop", "length")
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = client.chat.completions.create(model="law", messages=QUESTION, max_completion_tokens=12)
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    own = [{"role": "system", "content": "Be brief."}, *QUESTION]
    other = client.chat.completions.create(model="tax", messages=own, max_tokens=12)
    assert other.choices[0].message.content.strip() != expected["tax"]


def test_concurrent_streams_do_not_mix(server: str, expected: dict[str, str]) -> None:
    async def one(client: openai.AsyncOpenAI, name: str) -> None:
        stream = await client.chat.completions.create(
            model=name, messages=QUESTION, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
        assert text.strip() == expected[name] and chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason and not chunks[-1].choices
        assert chunks[-1].usage.completion_tokens <= 12

    async def all_at_once() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as client:
            await asyncio.gather(*(one(client, name) for name in MODELS * 3))
            answer = await client.completions.create(model="base", prompt="Norway's", max_tokens=3)
            assert answer.usage.completion_tokens <= 3

    asyncio.run(all_at_once())


def test_several_answers_seeds_and_stops(client: openai.OpenAI, tiny_checkpoint: Path) -> None:
    drawn = {"model": "law", "messages": QUESTION, "max_tokens": 8, "temperature": 1.5, "n": 3, "seed": 7}
    first, second = (client.chat.completions.create(**drawn) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices] and len(set(texts)) == 3
    del drawn["seed"]
    assert texts != [choice.message.content for choice in client.chat.completions.create(**drawn).choices]

    whole = client.completions.create(model="base", prompt="The quick", max_tokens=24).choices[0].text
    stop = whole[len(whole) // 2 :][:2]
    cut = client.completions.create(model="base", prompt="The quick", max_tokens=24, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    ids = Tokenizer.from_checkpoint(tiny_checkpoint).encode("The quick")
    several = client.completions.create(model="base", prompt=[ids, ids[:1]], max_tokens=24, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in several.choices[:2]] == [whole, whole]
    assert several.usage.prompt_tokens == len(ids) + 1
    chosen = client.chat.completions.create(model="tax", messages=QUESTION, extra_body={"choices": ["yes", "no"]})
    assert chosen.choices[0].message.content in ("yes", "no")


def test_logprobs(client: openai.OpenAI, tiny_checkpoint: Path) -> None:
    answer = client.chat.completions.create(
        model="base", messages=QUESTION, max_tokens=4, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    for token in tokens:
        assert [token.logprob, len(token.top_logprobs)] == [token.top_logprobs[0].logprob, 3]  # it is greedy
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    streamed = client.chat.completions.create(
        model="base", messages=QUESTION, max_tokens=4, logprobs=True, top_logprobs=3, stream=True
    )
    pieces = [piece for chunk in streamed if chunk.choices[0].logprobs for piece in chunk.choices[0].logprobs.content]
    assert [piece.bytes for piece in pieces] == [token.bytes for token in tokens]

    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_checkpoint(tiny_checkpoint)
    ids = tokenizer.encode("The quick")
    completion = client.completions.create(model="base", prompt=ids, max_tokens=1, logprobs=2).choices[0].logprobs
    logits = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)(torch.tensor([ids])).logits[0, -1]
    assert completion.token_logprobs == pytest.approx([logits.log_softmax(-1).max().item()], abs=1e-4)
    assert completion.tokens[0] in completion.top_logprobs[0] and completion.text_offset == [0]


def test_errors_as_the_client_knows_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="law", messages=[{"role": "user", "content": "word " * 600}])
    assert long.value.code == "context_length_exceeded"
    for wrong in ({"tools": [{}]}, {"response_format": {"type": "json_object"}}, {"presence_penalty": 0.5}):
        with pytest.raises(openai.BadRequestError, match="not implemented"):
            client.chat.completions.create(model="law", messages=QUESTION, extra_body=wrong)
    harmless = {"presence_penalty": 0, "tools": [], "user": "me", "store": False, "response_format": {"type": "text"}}
    client.chat.completions.create(model="law", messages=QUESTION, max_tokens=1, extra_body=harmless)


# --- limits and their errors


BAD_BODIES = [
    b"", b"{", b"[]", b"null", b'{"model": "\xff"}', b"[" * 100_000, b'{"a":' * 5_000, b'{"model": ' + b"1" * 5_000,
    {"model": "law"}, {"model": 3, "messages": QUESTION}, {"model": "law", "messages": []},
    {"model": "law", "messages": [{"role": "user", "content": "\ud800"}]},
    {"model": "law", "messages": [{"role": "tool", "content": "x"}]},
    {"model": "law", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"model": "law", "messages": [QUESTION[0], {"role": "system", "content": "x"}]},
    *({"model": "law", "messages": QUESTION, **wrong} for wrong in (
        {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 10**30}, {"max_tokens": 1.5}, {"max_tokens": "5"},
        {"max_tokens": 401}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": -1},
        {"n": 10**9}, {"n": 9}, {"n": True}, {"stop": ""}, {"stop": ["x"] * 17}, {"temprature": 1}, {"\ud800": 1},
        {"choices": []}, {"top_logprobs": 21}, {"logprobs": 1},
    )),
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: str(body)[:60])
def test_bad_bodies(server: str, body: object) -> None:
    status, answer = ask(server, "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"]
    if isinstance(body, dict) and "\ud800" not in body and "max_tokens" in body:
        assert answer["error"]["param"] == "max_tokens"


def test_bad_prompts_and_requests(server: str) -> None:
    for prompt in ("", [], [[]], [-1], [10**6], [1, "a"], [True], None):
        assert ask(server, "/v1/completions", {"model": "base", "prompt": prompt})[0] == 400
    assert ask(server, "/v1/completions", b"{}", {"Content-Type": "text/plain"})[0] == 415
    assert ask(server, "/v1/completions", b" " * 2_000_000)[0] == 413
    assert ask(server, "/v1/completions", b"{}", {"Host": "somebody.example"})[0] == 403
    assert ask(server, "/v1/nothing", {})[0] == 404 and ask(server, "/v1/models", {})[0] == 405
    for raw in (
        b"\x00\xff\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n",
    ):
        with socket.create_connection(server.removeprefix("http://").split(":")) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1000)
    assert ask(server, "/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 1})[0] == 200


def test_a_client_that_leaves_frees_its_slot(server: str, client: openai.OpenAI) -> None:
    """Streaming or not, answered or waiting: four slots are taken, and more wait."""
    gone = metric(server, "requests_total")
    connections = []
    for number in range(6):
        connection = HTTPConnection(server.removeprefix("http://"), timeout=30)
        body = {"model": "base", "prompt": "x", "max_tokens": 400, "temperature": 2, "n": 2, "stream": number % 2 == 0}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        connections.append(connection)
    for connection in connections:
        connection.close()
    until(lambda: metric(server, "running") == metric(server, "waiting") == 0)
    assert metric(server, "requests_total") >= gone + 6
    assert client.completions.create(model="base", prompt="x", max_tokens=2).choices[0].text


def test_too_many_and_too_slow(tiny_checkpoint: Path) -> None:
    """One slot, one that waits, a tenth of a second: 429 with Retry-After, and 504 or an event."""
    with serving(tiny_checkpoint, "--slots", 1, "--max_waiting", 1, "--timeout", 0.1) as (url, _, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        long = {"model": "base", "prompt": "x", "max_tokens": 500, "temperature": 2}
        seen: list[Exception] = []

        def keep_asking() -> None:
            for _ in range(4):
                try:
                    client.completions.create(**long)
                except openai.APIStatusError as error:
                    seen.append(error)

        threads = [threading.Thread(target=keep_asking) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {error.status_code for error in seen} == {429, 504}
        full = next(error for error in seen if error.status_code == 429)
        assert full.response.headers["retry-after"] == "1" and full.code == "rate_limit_exceeded"
        with pytest.raises(openai.APIError, match="took longer"):
            for _ in client.completions.create(**long, stream=True):
                pass


def test_guesses_change_no_answer(tiny_checkpoint: Path, experts: Path, expected: dict[str, str]) -> None:
    with serving(tiny_checkpoint, "--adapters_dir", experts, "--draft", tiny_checkpoint) as (url, _, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for name in MODELS:
            answer = client.chat.completions.create(model=name, messages=QUESTION, max_tokens=12)
            assert answer.choices[0].message.content.strip() == expected[name]
        assert metric(url, "guessed") >= metric(url, "guessed_right") > 0  # the base guesses what the base says


def test_token_page_and_end(tiny_checkpoint: Path, experts: Path) -> None:
    with serving(tiny_checkpoint, "--adapter_dir", experts / "law", LIT_LLAMA_API_KEY="sesame") as (url, process, _):
        right = openai.OpenAI(base_url=f"{url}/v1", api_key="sesame")
        assert [model.id for model in right.models.list()] == ["base", "law"]
        for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "Basic sesame"}):
            status, answer = ask(url, "/v1/chat/completions", b"{", headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
        connection.putrequest("GET", "/v1/models")
        for key in ("sesame", "other"):
            connection.putheader("Authorization", f"Bearer {key}")
        connection.endheaders()
        assert connection.getresponse().status == 401
        for path, status in (("/", 200), ("/health", 200), ("/metrics", 401), ("/openapi.json", 401)):
            connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
            connection.request("GET", path)
            response = connection.getresponse()
            text = response.read().decode()
            assert response.status == status, path
            if path == "/":
                policy = response.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy and "unsafe" not in policy
                assert not re.search(r"https?://|innerHTML|@import", text)  # all is in it, and texts stay texts
        stream = a_long_stream(right)
        process.send_signal(signal.SIGINT)  # what is under way is finished, and that is no failure
        assert len([chunk for chunk in stream if chunk.choices[0].finish_reason]) == 8


def test_a_failure_within_a_stream_is_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing:
        requests = [None]

        async def __aenter__(self) -> None: ...

        async def __aexit__(self, *error: object) -> None: ...

        async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
            yield 0, Piece("Oslo", 1)
            raise RuntimeError("out of memory")

    async def all_events() -> list[str]:
        return [event async for event in events(Failing(), False, header_of(False, True, "base"), False)]

    begin, piece, failure, done = asyncio.run(all_events())
    assert begin == "" and "Oslo" in piece and done == "data: [DONE]\n\n"
    assert json.loads(failure.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "out of memory" in capsys.readouterr().err


def test_another_name_of_this_machine_is_as_safe(tiny_checkpoint: Path) -> None:
    with serving(tiny_checkpoint, "--host", "127.0.1.1") as (url, _, _):
        assert "//127.0.1.1:" in url
        body = {"model": "base", "prompt": "x", "max_tokens": 1}
        assert ask(url, "/v1/completions", body)[0] == 200
        status, answer = ask(url, "/v1/completions", body, {"Host": "rebound.example"})
        assert status == 403 and "127.0.1.1 only" in answer["error"]["message"]
        body["choices"] = ["a", "many words " * 50]
        status, answer = ask(url, "/v1/completions", body | {"max_tokens": 4})
        assert status == 400 and answer["error"]["param"] == "choices"


def test_the_end_of_who_takes_too_long(tiny_checkpoint: Path) -> None:
    with serving(tiny_checkpoint, "--grace", 0, "--max_new_tokens", 500) as (url, process, _):
        stream = a_long_stream(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in stream:
                pass


def a_long_stream(client: openai.OpenAI) -> openai.Stream:
    """Eight answers of 500 tokens, which has begun."""
    drawn = {"prompt": "x", "max_tokens": 500, "temperature": 2, "seed": 1, "n": 8}
    stream = client.completions.create(model="base", stream=True, **drawn)
    next(iter(stream))
    return stream


def test_what_cannot_be_served(tiny_checkpoint: Path, experts: Path) -> None:
    def arguments(**given: object) -> ServeArguments:
        return ServeArguments(checkpoint_dir=tiny_checkpoint, dtype="fp32", **given)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        for given, message in (
            ({"port": taken.getsockname()[1]}, "cannot listen"), ({"port": 10**6}, "65536"),
            ({"host": "no.such.host.invalid"}, "cannot listen"), ({"timeout": 0}, "timeout"),
            ({"adapter_dir": experts / "law", "adapters_dir": experts}, "choose one"),
            ({"num_samples": 2, "temperature": 1.0}, "with n"),
            ({"port": 0, "max_length": 10**6}, "slots"),
        ):  # fmt: skip
            with pytest.raises(InputError, match=message):
                serve(arguments(**given))
    done = run_script("generate/serve.py", "--checkpoint_dir", tiny_checkpoint, "--slots", 0, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


# --- requests made up from the server's own description


def test_fuzzed_by_its_description(tiny_checkpoint: Path, experts: Path, tmp_path: Path) -> None:
    """schemathesis finds no answer that the description does not allow, and no request that it wrongly refuses."""
    with serving(tiny_checkpoint, "--adapters_dir", experts, "--max_new_tokens", 4) as (url, _, _):
        connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
        connection.request("GET", "/openapi.json")
        description = json.loads(connection.getresponse().read())
        for body in ("ChatRequest", "CompletionRequest"):  # names that exist, or every request ends at 404
            description["components"]["schemas"][body]["properties"]["model"]["enum"] = list(MODELS)
        (tmp_path / "openapi.json").write_text(json.dumps(description))
        command = [Path(sys.executable).with_name("st"), "run", "openapi.json", "--url", url, "--max-examples", "12"]
        command += [
            "--phases",
            "coverage,fuzzing",
            "--generation-deterministic",
            "--no-color",
            "--request-timeout",
            "20",
        ]
        # What no schema can say (room in the context, a prompt without tokens, the order of turns) is refused as well.
        command += ["--exclude-checks", "positive_data_acceptance"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-6000:]
        assert ask(url, "/v1/completions", {"model": "law", "prompt": "x", "max_tokens": 1})[0] == 200


def test_benchmark(tiny_checkpoint: Path, experts: Path, tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    options = {"checkpoint_dir": tiny_checkpoint, "adapters_dir": experts, "clients": 4, "seconds": 2, "out": out}
    options |= {"new_tokens": 6, "dtype": "fp32", "device": "cpu", "slots": 3}
    run_script(
        "scripts/benchmark_serving.py", *(part for key, value in options.items() for part in (f"--{key}", value))
    )
    report = json.loads(out.read_text())
    results = report["results"]
    assert results["outcomes"] == {"right": results["requests"]} and results["requests"] >= 4
    assert report["setting"]["distinct_answers"] > 3
    assert 0 < results["first_token_seconds"]["p50"] <= results["first_token_seconds"]["p99"]
    assert results["server_memory_gb"][0] > 0 and results["tokens_per_second"] > 0
    done = run_script("scripts/benchmark_serving.py", "--url", "http://127.0.0.1:9", check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
