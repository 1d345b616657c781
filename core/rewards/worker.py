"""A process of its own for work that may never end: a regular expression on a model's text, a simplifier.

    call("tritium.core.rewards.text:search", [pattern, text], seconds=1.0)

One worker is kept, and answers in about 0.1 ms; one that is late is killed, and the next call starts another. Its
memory is limited too. Requests and answers are JSON.
"""

import atexit
import json
import subprocess
import sys
import threading
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from typing import Any

MEMORY = 2 << 30  # bytes of address space
STARTING = 60.0  # seconds that a worker may take to start, and to import a module: no call is late for these


class WorkerError(RuntimeError):
    """The call took too long, or ended its process."""


class Worker:
    """A process that calls functions."""

    def __init__(self):
        self.channel, theirs = Pipe()
        command, null = [sys.executable, "-m", __name__, str(theirs.fileno())], subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=null, stdout=null, stderr=null, start_new_session=True
        )
        theirs.close()
        self.imported: set[str] = set()

    def ask(self, function: str, arguments: list, seconds: float) -> dict:
        """Raises: OSError or EOFError where there is no answer in time: the worker is of no more use then."""
        self.channel.send_bytes(json.dumps([function, arguments]).encode())
        if not self.channel.poll(seconds):
            raise EOFError
        return json.loads(self.channel.recv_bytes())


_lock = threading.Lock()
_worker: Worker | None = None


def call(function: str, arguments: list, seconds: float) -> Any:
    """`module:function(*arguments)`, all of it JSON, in the worker. Raises: WorkerError; ValueError where it raised."""
    global _worker
    module = function.partition(":")[0]
    with _lock:
        try:
            _worker = _worker or Worker()
            if module not in _worker.imported:
                _worker.ask(f"{__name__}:prepare", [module], STARTING)
                _worker.imported.add(module)
            reply = _worker.ask(function, arguments, seconds)
        except BaseException as error:  # also where its answer would come after an interruption, to another call
            stop()
            if isinstance(error, OSError | EOFError):
                raise WorkerError(f"no answer within {seconds:g} s, or the process died") from None
            raise
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["value"]


def prepare(module: str) -> None:
    import_module(module)


@atexit.register
def stop() -> None:
    global _worker
    if _worker is not None:
        _worker.process.kill()
        _worker.process.wait()
        _worker.channel.close()
        _worker = None


def serve(channel: Connection) -> None:
    """The worker's loop: until its caller has gone."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while True:
        function, arguments = json.loads(channel.recv_bytes())
        module, _, name = function.partition(":")
        try:
            reply = {"value": getattr(import_module(module), name)(*arguments)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        channel.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
