"""scripts/download.py against a small hub on 127.0.0.1 that speaks the part of the protocol that is needed."""

import hashlib
import http.server
import json
import os
import re
import runpy
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file, save_file

from lit_llama.checkpoint import fingerprint
from lit_llama.errors import InputError

pytest.importorskip("huggingface_hub")
SCRIPT = "scripts/download.py"
script = runpy.run_path(str(ROOT / SCRIPT))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHECKPOINT_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves `directory` as the repository org/tiny; org/gated and the rest are refused."""

    protocol_version = "HTTP/1.1"
    directory: Path
    requests: list[str]
    break_after: int | None
    """Close the connection in the middle of the weights, once, after so many bytes; 0: always, before the first."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/gated"):
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif re.fullmatch(r"/api/models/org/tiny/revision/(?!main|0123456789abcdef).*", path):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path == "/api/models/org/tiny" or path.startswith("/api/models/org/tiny/revision/"):
            files = [{"rfilename": name} for name in sorted(os.listdir(self.directory))]
            self.reply(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": files}).encode())
        elif path.startswith("/api/models/org/tiny/tree/"):
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": self.etag(file)}
                for file in sorted(self.directory.iterdir())
            ]
            self.reply(200, json.dumps(tree).encode())
        elif match := re.fullmatch(f"/org/tiny/resolve/{COMMIT}/(.+)", path):
            self.send_file(self.directory / match[1])
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    @staticmethod
    def etag(file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def send_file(self, file: Path) -> None:
        content = file.read_bytes()
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        headers = {"ETag": f'"{self.etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and file.suffix == ".safetensors" and type(self).break_after is not None:
            self.reply(200, content, headers, stop_after=type(self).break_after)
            type(self).break_after = type(self).break_after and None
        else:
            self.reply(206 if start else 200, content[start:], headers)

    def reply(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, stop_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stop_after])
        if stop_after is not None:
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[type[Hub]]:
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "served"))
    for name in ("pytorch_model.bin", "consolidated.00.pth", "modeling_tiny.py", "README.md", "flax_model.msgpack"):
        (directory / name).write_bytes(b"never fetched")
    handler = type("Handler", (Hub,), {"directory": directory, "requests": [], "break_after": None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def download(hub: type[Hub], tmp_path: Path, *arguments: object, repo_id: str = "org/tiny", **options: object):
    env = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return run_script(
        SCRIPT, "--repo_id", repo_id, "--checkpoint_dir", tmp_path / "out" / "tiny", *arguments, env=env, **options
    )


def test_fetches_the_checkpoint_and_nothing_else(hub: type[Hub], tiny_checkpoint: Path, tmp_path: Path) -> None:
    process = download(hub, tmp_path)
    out_dir = tmp_path / "out" / "tiny"
    assert process.stdout.strip() == str(out_dir)
    assert sorted(os.listdir(out_dir)) == CHECKPOINT_FILES
    for name in CHECKPOINT_FILES:
        assert (out_dir / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    assert fingerprint(out_dir) == fingerprint(tiny_checkpoint)
    assert os.listdir(tmp_path / "out") == ["tiny"]
    assert not [line for line in hub.requests if re.search(r"\.(bin|pth|py|md|msgpack)", line)]

    process = download(hub, tmp_path, check=False)
    assert process.returncode == 2 and "--overwrite" in process.stderr
    download(hub, tmp_path, "--overwrite", "true")
    assert sorted(os.listdir(out_dir)) == CHECKPOINT_FILES


def test_goes_on_after_a_broken_connection(hub: type[Hub], tmp_path: Path) -> None:
    weights = hub.directory / "model.safetensors"
    save_file(load_file(weights) | {"padding": torch.rand(6_000_000)}, weights)  # the client writes 10 MiB at a time
    hub.break_after = 15_000_000
    download(hub, tmp_path)
    assert any(line.endswith(f"model.safetensors bytes={10 << 20}-") for line in hub.requests)
    assert (tmp_path / "out" / "tiny" / "model.safetensors").read_bytes() == weights.read_bytes()


def test_run_again_fetches_what_is_missing(hub: type[Hub], tmp_path: Path) -> None:
    hub.break_after = 0
    process = download(hub, tmp_path, check=False)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: org/tiny: the hub cannot be reached")
    assert not (tmp_path / "out" / "tiny").exists()

    hub.break_after = None
    hub.requests.clear()
    download(hub, tmp_path)
    fetched = {line.split("/")[-1] for line in hub.requests if line.startswith("GET") and "/resolve/" in line}
    assert fetched == {"config.json", "model.safetensors"}  # the configuration is looked at before everything else
    assert sorted(os.listdir(tmp_path / "out" / "tiny")) == CHECKPOINT_FILES


@pytest.mark.parametrize(
    ("repo_id", "arguments", "message"),
    [
        ("org/unknown", [], "org/unknown: no such repository"),
        ("org/gated", [], "org/gated is gated"),
        ("org/tiny", ["--revision", "v9"], "org/tiny has no revision 'v9'"),
    ],
)
def test_refusals_in_one_line(hub: type[Hub], tmp_path: Path, repo_id: str, arguments: list[str], message: str) -> None:
    process = download(hub, tmp_path, *arguments, repo_id=repo_id, check=False)
    assert process.returncode == 2
    assert message in process.stderr and process.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_architectures_are_refused_before_the_weights(hub: type[Hub], tmp_path: Path) -> None:
    config = json.loads((hub.directory / "config.json").read_text())
    (hub.directory / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    process = download(hub, tmp_path, check=False)
    assert process.returncode == 2 and "model_type is 'gemma'" in process.stderr
    assert not [line for line in hub.requests if "safetensors" in line]


def test_no_network(tmp_path: Path) -> None:
    hub = type("Closed", (), {"address": "http://127.0.0.1:9"})
    process = download(hub, tmp_path, check=False)
    assert process.returncode == 2
    assert "the hub cannot be reached" in process.stderr and process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "not a name"}, "expected OWNER/NAME"),
        ({"repo_id": "org/tiny", "token_file": Path("missing.txt")}, "missing.txt: no such file"),
    ],
)
def test_refusals_before_any_request(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        script["main"](checkpoint_dir=tmp_path / "out", **arguments)
    assert os.listdir(tmp_path) == []


def test_selection_of_files() -> None:
    select_files = script["select_files"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    small = ["config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"]
    refused = [
        ".gitattributes", "LICENSE", "README.md", "USE_POLICY.md", "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json", "consolidated.safetensors", "original/consolidated.00.pth",
        "original/params.json", "original/tokenizer.model", "onnx/model.safetensors", "model.gguf", "modeling_x.py",
        "adapter_model.safetensors",
    ]  # fmt: skip
    assert select_files(shards + small + refused) == sorted(shards + small)
    assert select_files([*shards, "model.safetensors", "chat_template.jinja"]) == [
        "chat_template.jinja",
        "model.safetensors",
    ]
