"""A pool of processes that stay for the whole session, so that a test on n ranks costs milliseconds and not a spawn.

    def job(x):                       # module level, in the test's own file
        mesh = init_mesh(tp=2)        # gloo is running: a default process group of the job's own
        return …                      # plain data and tensors

    results = pool2.run(job, x)       # one result per rank

An exception on a rank is raised in the test, with that rank's traceback as a note; a job past its time limit gets its
stacks printed and its processes killed, and the next `run` starts new ones. Process groups live as long as the job,
and no worker outlives pytest, however that ends.
"""

import contextlib
import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

GRACE = 5.0  # seconds for the other ranks to notice, once one has failed, and for a killed one to print its stacks
TIMEOUT = timedelta(seconds=60)  # of a collective in a job

# Workers are forks of one process that has imported torch and run nothing: 1.5 s of CPU once and not for each.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.device_mesh", "pytest"])


class Pool:
    """`world_size` processes, one CPU thread each, started by the first `run` and again when one is gone."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        self.jobs = 0
        self.folder: tempfile.TemporaryDirectory | None = None

    def run(self, job: Callable, *args: Any, timeout: float = 60.0) -> list[Any]:
        """`job(*args)` on every rank; the results in rank order.

        `job` is found again by its file and name, as pytest's importlib mode makes test modules that can't be
        imported by name. Raises: the first exception of a rank; TimeoutError; RuntimeError if a worker dies.
        """
        if "<locals>" in job.__qualname__:
            raise ValueError(f"{job.__qualname__} is a local function: workers can only find those of a module")
        if not self.processes or not all(process.is_alive() for process in self.processes):
            self.close()
            self._start()
        self.jobs += 1
        message = pickle.dumps((self.jobs, inspect.getfile(job), job.__qualname__, args))
        for connection in self.connections:
            connection.send_bytes(message)
        return self._collect(job.__qualname__, timeout)

    def _collect(self, name: str, timeout: float) -> list[Any]:
        results, failures, deadline = {}, [], time.monotonic() + timeout
        while len(results) < self.world_size:
            missing = {c: rank for rank, c in enumerate(self.connections) if rank not in results}
            ready = wait(list(missing), max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                failures.append((deadline, TimeoutError(f"{name}: no answer from ranks {[*missing.values()]} in time")))
                break
            for connection in ready:
                rank = missing[connection]
                try:
                    results[rank], failure = pickle.loads(connection.recv_bytes())
                except EOFError:
                    self.processes[rank].join()
                    end = f"{name}: the worker of rank {rank} died, exit code {self.processes[rank].exitcode}"
                    results[rank], failure = None, (time.monotonic(), RuntimeError(end))
                if failure:
                    failures.append(failure)
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]  # the first is the cause, the rest lost a peer
        return [results[rank] for rank in range(self.world_size)]

    def _start(self) -> None:
        # They meet in a file. A TCP store looks up the name of each peer, and a slow name server makes that seconds.
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.world_size):
            ours, theirs = _context.Pipe()
            arguments = {"arguments": (rank, self.world_size, f"{self.folder.name}/store", theirs)}
            process = _context.Process(target=runpy.run_path, args=(__file__, arguments, "worker"), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def kill(self) -> None:
        """End the workers at once. What they were doing goes to stderr."""
        for process in self.processes:
            os.kill(process.pid, signal.SIGABRT)  # faulthandler prints the stacks
        self.close()

    def close(self) -> None:
        """End the workers, which wait for a job."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(GRACE)
            process.kill()
            process.join()
        if self.folder:
            self.folder.cleanup()
        self.processes, self.connections, self.folder = [], [], None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def work(rank: int, world_size: int, file: str, connection: Connection) -> None:
    """The worker's loop: a job comes in, `(result, None)` or `(None, (time, exception))` goes out."""
    torch.set_num_threads(1)
    faulthandler.enable()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a GPU machine too, these are ranks on gloo
    store = dist.FileStore(file, world_size)
    while True:
        try:
            number, path, name, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        _join(dist.PrefixStore(str(number), store), rank, world_size)
        try:
            answer = pickle.dumps((getattr(_load(path), name)(*args), None))
        except Exception as error:
            answer = pickle.dumps((None, (time.monotonic(), _portable(error, rank))))
            if dist.is_initialized():
                dist.destroy_process_group()  # at once: ranks that wait for this one see it leave
        connection.send_bytes(answer)
        _leave()


def _join(store: dist.Store, rank: int, world_size: int) -> None:
    """Start the job's process group. A failure ends the worker: torch does not clean up after half an init."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    sys.excepthook = sys.__excepthook__  # each init wraps it once more
    dist.barrier()  # gloo fails a rank that still connects to one which has closed its groups again


def _leave() -> None:
    """End the job's groups together with the peers: a fast rank must not take its connections from a slow one."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # a peer has failed, and says so itself
            dist.barrier()
        dist.destroy_process_group()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _load(path: str) -> ModuleType:
    """The module of a test file, loaded once."""
    if path not in sys.modules:
        spec = importlib.util.spec_from_file_location(path, path)
        sys.modules[path] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path]
            raise
    return sys.modules[path]


def _portable(error: Exception, rank: int) -> Exception:
    """The exception itself, if it can be pickled and read again, with its traceback as a note."""
    text = f"on rank {rank}:\n{traceback.format_exc()}"
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(repr(error))
    error.add_note(text)
    return error


if __name__ == "worker":
    work(*globals()["arguments"])
