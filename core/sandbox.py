"""A place where model-written code may run: no network, no files but a scratch folder, limits, and an end.

    outcome = run_python("print(6 * 7)")          outcome.stdout == "42\\n", outcome.ok
    outcome = run([…argv…], stdin="…", files={"name": "text"}, limits=Limits(seconds=2))

Each call is a fresh process with an empty environment, in the strongest level that the system allows (`level()`):

    namespaces   its own users, mounts, processes, network: it sees the system's programs, Python, and /scratch (Linux)
    confined     Landlock and seccomp: likewise, and it can't start processes or send signals (Linux ≥ 5.13: containers
                 that forbid namespaces)
    limits       resource limits only, which is no containment: said loudly, once

Memory is limited per process, so that a program's bound is `processes` × `memory`. See bench/results/sandbox.md.
"""

import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LEVELS = ("namespaces", "confined", "limits")
PYTHON = os.path.realpath(sys.executable)
START = 30.0  # seconds for the sandbox itself, which come before the program's


class SandboxError(RuntimeError):
    """The sandbox could not be set up: nothing was run."""


@dataclass(frozen=True)
class Limits:
    """seconds of wall time from the program's first instruction (and of CPU time, per process); bytes of memory (per
    process), of files, of output."""

    seconds: float = 10.0
    memory: int = 512 << 20
    processes: int = 16
    disk: int = 32 << 20
    output: int = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `killed` says why it was not left to end by itself: "time", "output" or ""."""

    returncode: int
    stdout: str
    stderr: str
    killed: str = ""

    @property
    def ok(self) -> bool:
        return self.returncode == 0 and not self.killed


def run_python(code: str, stdin: str = "", limits: Limits = Limits(), at: str = "") -> Outcome:
    """Run a Python program (this interpreter, standard library only). Raises: SandboxError."""
    return run([*PYTHON_ARGV, "program.py"], stdin, {"program.py": code}, limits, at)


PYTHON_ARGV = [PYTHON, "-I", "-S", "-B"]


def run(
    argv: Sequence[str], stdin: str = "", files: dict[str, str] | None = None, limits: Limits = Limits(), at: str = ""
) -> Outcome:
    """Run a program with `files` in its working folder, at a level (default: the strongest). Raises: SandboxError."""
    pipe = subprocess.PIPE
    with Sandbox(argv, files or {}, limits, at or level(), stdin=pipe, stdout=pipe, stderr=pipe) as box:
        killed, texts = box.communicate(stdin.encode("utf-8", "replace"))
        return Outcome(box.end(), *(text.decode("utf-8", "replace") for text in texts), killed)


def level() -> str:
    """The strongest level that works here; tried once. Says so on standard error where it is not namespaces."""
    with _trying:
        return strongest()


_trying = threading.Lock()  # a judge's threads, or a tool's, would each have tried, and said so


@functools.cache
def strongest() -> str:
    reasons = []
    for name in LEVELS:
        try:
            if run_python("print('in')", at=name).stdout == "in\n":
                if reasons:
                    print(f"tritium: sandbox: model-written code runs at level {name!r} only; {'; '.join(reasons)}"
                          + ("" if name == "confined" else ". IT IS NOT CONTAINED."), file=sys.stderr)  # fmt: skip
                return name
            reasons.append(f"{name}: a trial did not run")
        except SandboxError as error:
            reasons.append(f"{name}: {error}")
    raise SandboxError("no level works: " + "; ".join(reasons))


class Sandbox:
    """A program in a sandbox, with its pipes; leaving the context kills all that is left of it."""

    def __init__(self, argv: Sequence[str], files: dict[str, str], limits: Limits, at: str, **pipes: int | IO):
        self.namespaced = at == "namespaces"  # only there does the program's end have to be told
        self.limits, self.deadline, self.said = limits, time.monotonic() + START, b""
        self.folder = tempfile.TemporaryDirectory(prefix="tritium-sandbox-", ignore_cleanup_errors=True)
        spec = {"argv": list(argv), "files": files, "root": self.folder.name, "level": at, "prefix": prefix()}
        spec |= {name: getattr(limits, name) for name in ("seconds", "memory", "processes", "disk")}
        self.status, theirs = os.pipe()
        stdin = pipes.pop("stdin")
        outer = os.pipe() if stdin == subprocess.PIPE else (stdin, None)
        command = [PYTHON, "-I", "-S", "-B", Path(__file__).with_name("sandbox_init.py"), str(theirs), str(outer[0])]
        with tempfile.TemporaryFile() as order:
            order.write(json.dumps(spec).encode() + b"\n")
            order.seek(0)
            self.process = subprocess.Popen(
                command, stdin=order, pass_fds=(theirs, outer[0]), start_new_session=True, env={}, **pipes
            )
        os.close(theirs)
        if outer[1] is not None:
            os.close(outer[0])
        self.stdin = outer[1]

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        for number in (self.status, self.stdin):
            if number is not None:
                os.close(number)
        self.folder.cleanup()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> int:
        """Its exit code, once it has ended. Raises: SandboxError where it never began."""
        code = self.process.wait()
        self.kill()  # at the level "limits", children may be left
        os.set_blocking(self.status, False)
        with suppress(BlockingIOError):
            self.said += os.read(self.status, 4096)
        said = self.said.decode(errors="replace").removeprefix("S")
        if said.startswith("E"):
            raise SandboxError(said[2:])
        return int(said[2:]) if said else -signal.SIGKILL if self.namespaced and not code else code

    def communicate(self, text: bytes) -> tuple[str, list[bytes]]:
        """Feed and read until it ends, the deadline comes or there is too much output: (why killed, texts)."""
        outputs = [pipe for pipe in (self.process.stdout, self.process.stderr) if pipe]
        texts, killed = [bytearray() for _ in outputs], ""
        with selectors.DefaultSelector() as selector:
            selector.register(self.status, selectors.EVENT_READ)
            for pipe, buffer in zip(outputs, texts, strict=True):
                selector.register(pipe, selectors.EVENT_READ, buffer)
            if self.stdin is not None:
                os.set_blocking(self.stdin, False)
                selector.register(self.stdin, selectors.EVENT_WRITE, None)
            while selector.get_map() and not killed:
                for key, _ in selector.select(max(self.deadline - time.monotonic(), 0)):
                    if key.fd == self.status:  # it begins
                        self.said, self.deadline = os.read(key.fd, 4096), time.monotonic() + self.limits.seconds
                        selector.unregister(key.fd)
                    elif key.data is None:
                        text = self.feed(text, selector)
                    elif chunk := os.read(key.fd, 1 << 16):
                        key.data.extend(chunk)
                    else:
                        selector.unregister(key.fileobj)
                if sum(map(len, texts)) > self.limits.output:
                    killed = "output"
                elif time.monotonic() >= self.deadline:
                    killed = "time"
        try:  # it may have closed its pipes and go on
            self.process.wait(0 if killed else max(self.deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            killed = killed or "time"
        if killed:
            self.kill()
        return killed, [bytes(buffer[: self.limits.output]) for buffer in texts]

    def feed(self, text: bytes, selector: selectors.BaseSelector) -> bytes:
        try:
            text = text[os.write(self.stdin, text[: 1 << 16]) :] if text else text
        except BrokenPipeError:
            text = b""
        if not text:
            selector.unregister(self.stdin)
            os.close(self.stdin)
            self.stdin = None
        return text


def prefix() -> str:
    """Where this Python lives, which the sandbox may read."""
    return os.path.realpath(sys.base_prefix)
