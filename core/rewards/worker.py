"""A process of its own for work that may never end: a regular expression on a model's text, a simplifier.

    call("tritium.core.rewards.text:search", [pattern, text], seconds=1.0)

One worker is kept, and answers in about 0.1 ms; one that is late is killed, and the next call starts another. Its
memory is limited too. Requests and answers are lines of JSON.
"""

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
from importlib import import_module
from typing import Any

MEMORY = 2 << 30  # bytes of address space
STARTING = 60.0  # seconds that a worker may take to start, and to import a module: no call is late for these


class WorkerError(RuntimeError):
    """The call took too long, or ended its process."""


_lock = threading.Lock()
_worker: subprocess.Popen | None = None
_imported: set[str] = set()  # by the worker


def call(function: str, arguments: list, seconds: float) -> Any:
    """`module:function(*arguments)`, all of it JSON, in the worker. Raises: WorkerError; ValueError where it raised."""
    module = function.partition(":")[0]
    with _lock:
        if _worker is None or _worker.poll() is not None:
            start()
        if module not in _imported:
            _exchange([f"{__name__}:prepare", [module]], STARTING)
            _imported.add(module)
        reply = _exchange([function, arguments], seconds)
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["value"]


def _exchange(request: list, seconds: float) -> dict:
    try:
        _worker.stdin.write(json.dumps(request).encode() + b"\n")
        _worker.stdin.flush()
        line = _readline(_worker, seconds)
    except OSError:
        line = b""
    if not line.endswith(b"\n"):
        stop()
        raise WorkerError(f"no answer within {seconds:g} s, or the process died")
    return json.loads(line)


def _readline(worker: subprocess.Popen, seconds: float) -> bytes:
    """A line of the worker's, or what there is of it at the deadline. Its answers are shorter than a pipe's buffer."""
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        return worker.stdout.readline() if selector.select(seconds) else b""


def prepare(module: str) -> None:
    import_module(module)


def start() -> None:
    global _worker
    atexit.register(stop)
    command = [sys.executable, "-m", "tritium.core.rewards.worker"]
    pipe = subprocess.PIPE
    _worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True)
    _imported.clear()
    _readline(_worker, STARTING)


def stop() -> None:
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.communicate()
        _worker = None


def serve() -> None:
    """The worker's loop: until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a function prints is no answer
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        function, arguments = json.loads(line)
        module, _, name = function.partition(":")
        try:
            reply = {"value": getattr(import_module(module), name)(*arguments)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    serve()
