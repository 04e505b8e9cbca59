"""A server of a base model and its experts, from its arguments to its end.

Here: what is loaded, where is listened, the engine's thread, signals. The HTTP application is `server_app.py`, which is
imported only when a server starts, because FastAPI is.
"""

import ipaddress
import os
import socket
import sys
import threading
import traceback
from pathlib import Path

from lit_llama.answering import BASE, load_experts, load_for_generation, open_engine, style_and_system
from lit_llama.command_line import progress
from lit_llama.errors import InputError, RunError
from lit_llama.generation_arguments import ServeArguments

API_KEY = "LIT_LLAMA_API_KEY"
"""Environment variable of the token."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine that no foreign page can have."""


def serve(arguments: ServeArguments) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        InputError: arguments that make no sense, a package that is missing, an address that cannot be listened at.
        RunError: the engine failed.
    """
    check(arguments)
    try:
        from lit_llama.server_answers import Form, Service
        from lit_llama.server_app import HttpServer
    except ImportError as error:
        raise InputError(f"serving needs {error.name}: pip install -e '.[serve]'") from None
    listener = bind(arguments.host, arguments.port)
    experts: dict[str, Path] = {}
    model, tokenizer = load_for_generation(
        arguments, lambda model, _: experts.update(load_experts(model, arguments.adapter_dir, arguments.adapters_dir))
    )
    forms = {BASE: Form(None, *style_and_system(arguments, None))}
    forms |= {name: Form(name, *style_and_system(arguments, directory)) for name, directory in experts.items()}
    engine = open_engine(arguments, model, tokenizer, arguments.slots, arguments.max_length, arguments.max_waiting)
    api_key = (arguments.api_key or os.environ.get(API_KEY, "")).strip() or None
    local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    if api_key is None and not local:
        progress(f"warning: whoever reaches this machine can use the server: set --api_key or {API_KEY}")
    service = Service(
        engine=engine,
        forms=forms,
        defaults=arguments,
        max_new_tokens=arguments.max_new_tokens,
        timeout=arguments.timeout,
        max_body_bytes=arguments.max_body_bytes,
        api_key=api_key,
        hosts=list(dict.fromkeys((*LOOPBACK, arguments.host.lower()))) if local else None,
    )
    server = HttpServer(service, arguments.grace)
    failure: list[Exception] = []

    def work() -> None:
        try:
            engine.run()
        except Exception as error:
            traceback.print_exc()
            failure.append(error)
            server.should_exit = server.force_exit = True  # whoever watches over the process starts it anew

    # The engine gives the interpreter up in every step; 5 ms, as usual, would be long to wait for it again.
    sys.setswitchinterval(5e-4)
    thread = threading.Thread(target=work, name="engine")
    thread.start()
    try:
        server.run([listener])
    finally:
        engine.close()
        thread.join()
    if failure:
        raise RunError(f"the engine failed: {failure[0]}")


def check(arguments: ServeArguments) -> None:
    """Raises InputError for what can be told before anything is loaded."""
    if arguments.num_samples != 1:
        raise InputError("--num_samples: a request says itself how many answers it wants, with n")
    for name in ("max_new_tokens", "slots", "max_waiting", "max_body_bytes", "timeout"):
        if not getattr(arguments, name) > 0:
            raise InputError(f"--{name} {getattr(arguments, name)} must be positive")
    if not 0 <= arguments.port < 2**16:
        raise InputError(f"--port {arguments.port} is none: choose one below 65536, or 0 for any that is free")
    if not arguments.grace >= 0:
        raise InputError(f"--grace {arguments.grace} must not be negative")
    style_and_system(arguments, arguments.adapter_dir)


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address, which listens from the server's start on."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        why = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen at --host {host} --port {port} ({why}): choose others") from None
    return listener
