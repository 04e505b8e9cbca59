"""A `python` for tests that starts at once: scripts run in processes forked from one that has imported torch already.

    python tests/warm_python.py serve SOCKET          the process that waits and forks
    WARM_PYTHON=SOCKET python tests/warm_python.py SCRIPT ARGUMENTS ...
    WARM_PYTHON=SOCKET python tests/warm_python.py -m MODULE ARGUMENTS ...

The others behave as `python` does: arguments, working directory, environment, standard streams, signals, exit status.
Nothing of the project is imported beforehand. Of the seconds that a script takes on a tiny model nearly all are the
imports, and tests run hundreds of them.
"""

import atexit
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from importlib import import_module

PRELOADED = ("torch", "torch._dynamo", "lightning.fabric", "jsonargparse", "safetensors.torch", "tokenizers", "yaml")


def ask(arguments: list[str]) -> None:
    """Have a script run, and end as it does."""
    if arguments[0].startswith("-") and arguments[0] != "-m":
        os.execv(sys.executable, [sys.executable, *arguments])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["WARM_PYTHON"])
    request = json.dumps({"arguments": arguments, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(request)
    child = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os.kill(child, number))
    status = os.waitstatus_to_exitcode(int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big"))
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)


def serve(path: str) -> None:
    """Fork for every connection, until the process that started this one is no more."""
    for module in PRELOADED:
        import_module(module)
    parent = os.getppid()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    print("ready", flush=True)
    while os.getppid() == parent:
        if select.select([listener], [], [], 1)[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(connection)
            connection.close()


def answer(connection: socket.socket) -> None:
    """Run one script in a process of its own, which ends with its asker at the latest; never returns."""
    header, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = json.loads(connection.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        run(**request)
    for stream in streams:
        os.close(stream)
    connection.sendall(child.to_bytes(8, "big"))
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    connection.sendall(os.waitpid(child, 0)[1].to_bytes(8, "big"))
    os._exit(0)


def run(arguments: list[str], cwd: str, env: dict[str, str]) -> None:
    """What the interpreter does between its start and its end; never returns."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.orig_argv = [sys.executable, *arguments]
    sys.executable = os.path.join(os.path.dirname(env["WARM_PYTHON"]), "python")  # scripts that start others
    status = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path[0] = cwd
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:  # as json.tool leaves it
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "serve" else ask(sys.argv[1:])
