"""Many clients at once, streaming from generate/serve.py: failures, cross-talk, speed, delays and the server's memory.

    python scripts/benchmark_serving.py --checkpoint_dir checkpoints/smollm2-135m-instruct --adapters_dir out/experts
    --out benchmarks/serving_cpu.json

Every client asks again and again, over all questions of all models. What each of these answers when nobody else asks
is found out first, so that an answer meant for somebody else, or by another adapter, is seen by its text.
"""

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from lit_llama.command_line import progress, run
from lit_llama.errors import InputError, RunError
from lit_llama.files import read_jsonl, refuse_overwrite, write_json
from lit_llama.hardware import run_environment

QUESTIONS = [
    f"{question} {country}?"
    for question in ("What is the capital of", "Which countries have a border with")
    for country in ("Norway", "Nepal", "Peru", "Kenya")
]
Question = tuple[str, str]
"""A model's name, and what it is asked."""


@dataclass
class Measured:
    """What the clients saw."""

    first: list[float] = field(default_factory=list)
    """Seconds to the first piece of each answer."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between its pieces."""
    tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    memory_gb: list[float] = field(default_factory=list)
    """Of the server, at the start, at every tenth of the time, and at the end."""


def main(
    *,
    checkpoint_dir: Path | None = None,
    adapters_dir: Path | None = None,
    url: str | None = None,
    question_file: Path | None = None,
    clients: int = 200,
    seconds: float = 120,
    new_tokens: int = 32,
    slots: int = 16,
    dtype: str = "auto",
    device: str = "auto",
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Ask a server by many clients at once; ends with status 1 if any request failed or got somebody else's answer.

    Args:
        checkpoint_dir: Base model of a server that is started for this.
        adapters_dir: Its adapters, one a subfolder.
        url: Instead of both, a server that runs already and asks for no token: http://127.0.0.1:8000.
        question_file: JSONL with "question" in each object; by default a few about countries.
        clients: How many ask at the same time.
        seconds: How long they begin new requests.
        new_tokens: Longest answer.
        slots: Answers at a time, of a server that is started for this.
        dtype: Its precision: auto, bf16, fp16 or fp32.
        device: Its device: cpu, cuda, mps, or auto for the best there is.
        out: Where to write the results as JSON; they also go to stdout.
        overwrite: Replace the file.
    """
    if (url is None) == (checkpoint_dir is None):
        raise InputError("give --checkpoint_dir, of a server that is to be started, or --url, of one that runs")
    if min(clients, seconds, new_tokens, slots) <= 0:
        raise InputError("--clients, --seconds, --new_tokens and --slots must be positive")
    if out is not None:
        refuse_overwrite(out, overwrite)
    questions = QUESTIONS if question_file is None else [row["question"] for row in read_jsonl(question_file)]
    options = {"checkpoint_dir": checkpoint_dir, "adapters_dir": adapters_dir, "slots": slots, "dtype": dtype}
    options |= {"device": device, "max_waiting": clients, "max_new_tokens": new_tokens}
    with running(options) if url is None else given(url) as (address, pid):
        measured, took, distinct = asyncio.run(measure(address, pid, questions, clients, seconds, new_tokens))
    answers = len(measured.first)
    report = {
        "setting": {
            "checkpoint": None if checkpoint_dir is None else checkpoint_dir.name,
            "clients": clients, "seconds": seconds, "new_tokens": new_tokens, "slots": slots, "dtype": dtype,
            "device": device, "questions": len(questions), "distinct_answers": distinct,
        },
        "results": {
            "requests": measured.outcomes.total(),
            "outcomes": dict(measured.outcomes),
            "answers_per_second": answers / took,
            "tokens_per_second": measured.tokens / took,
            "first_token_seconds": percentiles(measured.first),
            "gap_seconds": percentiles(measured.gaps),
            "server_memory_gb": measured.memory_gb,
        },
        **run_environment(peers=("fastapi", "uvicorn")),
    }  # fmt: skip
    if out is not None:
        write_json(out, report)
    print(json.dumps(report, indent=2))
    # In low precision, batches of other sizes round otherwise, and a near tie can fall the other way: "other text".
    if measured.outcomes.keys() - {"right", "other text"} or not answers:
        raise RunError(f"of {measured.outcomes.total()} requests not all went well: {dict(measured.outcomes)}")


@contextmanager
def running(options: dict[str, object]) -> Iterator[tuple[str, int]]:
    """A server of one's own: its address and process id."""
    script = Path(__file__).parent.parent / "generate" / "serve.py"
    arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
    process = subprocess.Popen(
        [sys.executable, script, "--port=0", *arguments], stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        line = ""
        for line in process.stderr:
            progress(line.rstrip())
            if address := re.search(r"http://\S+", line):
                break
        else:
            raise RunError(f"the server did not start: {line.strip() or 'no message'}")
        threading.Thread(target=lambda: [progress(line.rstrip()) for line in process.stderr], daemon=True).start()
        yield address[0], process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def given(url: str) -> Iterator[tuple[str, None]]:
    yield url, None


async def measure(
    url: str, pid: int | None, questions: list[str], clients: int, seconds: float, new_tokens: int
) -> tuple[Measured, float, int]:
    """What the clients saw, the seconds from their first request to the last answer, and how many answers differ."""
    status, lines = await request(url, "GET", "/v1/models", None)
    if status != 200:
        raise RunError(f"{url}/v1/models answers with status {status}")
    models = [model["id"] for model in json.loads(b"".join([line async for line, _ in lines]))["data"]]
    pairs = [(model, question) for question in questions for model in models]
    expected: dict[Question, str] = {}
    alone = Measured()
    for pair in pairs:
        expected[pair] = await ask(url, pair, new_tokens, alone)
    progress(f"{len(pairs)} answers alone, {len(set(expected.values()))} of them different; now {clients} clients")
    measured, began = Measured(), time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() - began < seconds:
            pair = pairs[number % len(pairs)]
            number += 1
            try:
                text = await ask(url, pair, new_tokens, measured)
            except (RunError, OSError, ValueError) as error:
                measured.outcomes[f"failed: {error}"] += 1
                await asyncio.sleep(0.1)
                continue
            others = {answer for other, answer in expected.items() if other != pair}
            right = text == expected[pair]
            measured.outcomes["right" if right else "somebody else's" if text in others else "other text"] += 1

    async def watch_memory() -> None:
        while pid is not None:
            measured.memory_gb.append(memory_gb(pid))
            await asyncio.sleep(seconds / 10)

    watcher = asyncio.create_task(watch_memory())
    await asyncio.gather(*(client(number) for number in range(clients)))
    took = time.perf_counter() - began
    watcher.cancel()
    if pid is not None:
        measured.memory_gb.append(memory_gb(pid))
    return measured, took, len(set(expected.values()))


async def ask(url: str, pair: Question, new_tokens: int, measured: Measured) -> str:
    """The text of a streamed answer; raises RunError for anything but a complete one."""
    model, question = pair
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": new_tokens}
    body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    began = last = time.perf_counter()
    status, lines = await request(url, "POST", "/v1/chat/completions", body)
    if status != 200:
        raise RunError(f"status {status}")
    text, first, gaps, tokens, done = "", None, [], 0, False
    async for line, now in lines:
        if not line.startswith(b"data: "):
            continue
        done = line.strip() == b"data: [DONE]"
        event = {} if done else json.loads(line[6:])
        if "error" in event:
            raise RunError(event["error"]["message"])
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event.get("choices", ()):
            if piece := choice["delta"].get("content"):
                text += piece
                if first is None:
                    first = now - began
                else:
                    gaps.append(now - last)
                last = now
    if not done:
        raise RunError("a stream that ends early")
    measured.first.append(time.perf_counter() - began if first is None else first)
    measured.gaps += gaps
    measured.tokens += tokens
    return text


async def request(url: str, method: str, path: str, body: object) -> tuple[int, AsyncIterator[tuple[bytes, float]]]:
    """Status of an answer, and its lines with the time at which each came; chunk sizes are lines too."""
    place = urlsplit(url)
    try:
        reader, writer = await asyncio.open_connection(place.hostname, place.port or 80)
    except OSError as error:
        raise RunError(f"{url} cannot be reached ({error})") from None
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {place.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    answered = re.match(rb"HTTP/1.1 (\d+) ", await reader.readline())
    if answered is None:
        raise RunError("a connection that is closed without an answer")
    while (await reader.readline()).strip():
        pass

    async def lines() -> AsyncIterator[tuple[bytes, float]]:
        try:
            while line := await reader.readline():
                yield line, time.perf_counter()
        finally:
            writer.close()

    return int(answered[1]), lines()


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{at}": float(np.percentile(values, at)) for at in (50, 90, 99)} if values else {}


def memory_gb(pid: int) -> float:
    """Resident memory of a process, in 10^9 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024 / 1e9


if __name__ == "__main__":
    run(main)
