"""A stand-in for a Neptune server on the loopback interface: just enough of its HTTP interface for the real client.

The client reads the interface's description (Swagger) from the server, so this file describes what it answers. Whatever
the client sends is kept in `created`, `operations` and `files`.
"""

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

# operation: method, path, {parameter: where it is sent}, model of the answer
OPERATIONS = {
    "getClientConfig": ("get", "config", {"X-Neptune-Api-Token": "header", "alpha": "query"}, "Config"),
    "exchangeApiToken": ("get", "exchange", {"X-Neptune-Api-Token": "header"}, "Tokens"),
    "getProject": ("get", "project", {"projectIdentifier": "query"}, "Project"),
    "createExperiment": (
        "post",
        "create",
        {"experimentCreationParams": "body", "X-Neptune-CliVersion": "header"},
        "Run",
    ),
    "getExperiment": ("get", "run", {"experimentId": "query"}, "Run"),
    "getExperimentAttributes": ("get", "attributes", {"experimentId": "query"}, "Attributes"),
    "executeOperations": ("post", "execute", {"experimentId": "query", "operations": "body"}, None),
    "ping": ("post", "ping", {"experimentId": "query"}, None),
    "fileAtomUpload": ("post", "file", {}, None),
    "fileAtomMultipartUploadStart": ("post", "file-start", {}, None),
    "fileAtomMultipartUploadPart": ("post", "file-part", {}, None),
    "fileAtomMultipartUploadFinish": ("post", "file-finish", {}, None),
    "fileSetFileUpload": ("post", "set", {}, None),
    "fileSetFileMultipartUploadStart": ("post", "set-start", {}, None),
    "fileSetFileMultipartUploadPart": ("post", "set-part", {}, None),
    "fileSetFileMultipartUploadFinish": ("post", "set-finish", {}, None),
    "uploadFileSetAttributeTar": ("post", "set-tar", {}, None),
}
RUN = {
    "id": "r1",
    "type": "run",
    "shortId": "P-1",
    "organizationName": "team",
    "projectName": "llama",
    "trashed": False,
}
PROJECT = {"id": "p1", "name": "llama", "organizationName": "team", "projectKey": "P", "version": 2}


class NeptuneServer:
    """`with NeptuneServer() as server:`; then `server.token` is what a user would put into NEPTUNE_API_TOKEN."""

    def __init__(self) -> None:
        self.created: list[dict] = []
        self.operations: list[dict] = []
        self.files: dict[str, bytes] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                content = json.dumps(server.respond(urlparse(self.path), body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer

            def do_HEAD(self) -> None:
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        self.token = make_token(self.address)

    def __enter__(self) -> "NeptuneServer":
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def respond(self, url, body: bytes) -> object:
        name = url.path.rsplit("/", 1)[-1]
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if name == "swagger.json":
            return self.describe()
        if name == "token":  # OpenID refresh
            return {"access_token": self.jwt(), "refresh_token": "r", "token_type": "bearer", "expires_in": 3600}
        if name == "exchange":
            return {"accessToken": self.jwt(), "refreshToken": "r"}
        if name == "create":
            self.created.append(json.loads(body))
        if name == "execute":
            self.operations += json.loads(body)
            return []
        if name in ("file", "set"):
            self.files[query["attribute"]] = body
            return {"errors": []}
        config = {
            "apiUrl": self.address,
            "applicationUrl": self.address,
            "pyLibVersions": {"minCompatibleVersion": "1.0"},
        }
        return {"config": config, "project": PROJECT, "create": RUN, "run": RUN, "attributes": {"attributes": []}}.get(
            name
        )

    def jwt(self) -> str:
        claims = {"exp": int(time.time()) + 3600, "azp": "client", "iss": self.address}
        parts = [
            base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
            for part in ({"alg": "HS256"}, claims)
        ]
        return ".".join([*parts, "c2lnbmF0dXJl"])

    def describe(self) -> dict:
        # The one argument that the client turns into text as described here.
        date = {"type": "string", "format": "date-time"}
        creation = nested("gitInfo", "commit", "commitDate", date)
        paths = {}
        for operation, (method, path, parameters, model) in OPERATIONS.items():
            body = creation if operation == "createExperiment" else {}
            schema = {"schema": {"$ref": f"#/definitions/{model}"} if model else {}}
            paths[f"/api/{path}"] = {
                method: {
                    "operationId": operation,
                    "tags": ["api"],
                    "parameters": [
                        {"name": name, "in": place, **({"schema": body} if place == "body" else {"type": "string"})}
                        for name, place in parameters.items()
                    ],
                    "responses": {"200": {"description": "", **schema}},
                }
            }

        def model(*names: str, **others: dict) -> dict:
            return {"type": "object", "properties": {**dict.fromkeys(names, {}), **others}}

        definitions = {
            "Config": model("apiUrl", "applicationUrl", pyLibVersions={"$ref": "#/definitions/Versions"}),
            "Versions": model("minCompatibleVersion"),
            "Tokens": model("accessToken", "refreshToken"),
            "Project": model(*PROJECT),
            "Run": model(*RUN),
            "Attributes": model("attributes"),
        }
        return {"swagger": "2.0", "info": {"title": "", "version": ""}, "paths": paths, "definitions": definitions}


def nested(*names_and_leaf: Any) -> dict:
    """Schema of objects in objects: nested("a", "b", leaf) describes {"a": {"b": leaf}}."""
    *names, schema = names_and_leaf
    for name in reversed(names):
        schema = {"type": "object", "properties": {name: schema}}
    return schema


def make_token(address: str) -> str:
    content = {"api_address": address, "api_url": address, "api_key": "key"}
    return base64.b64encode(json.dumps(content).encode()).decode()
