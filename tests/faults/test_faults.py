"""Processes that die, stop or are cut off: a run under torchrun ends as if nothing had happened, or ends in time.

What a damaged checkpoint and a full disk do: tests/core/test_checkpoint.py and test_trainer.py.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tritium.core.checkpoint import damage
from tritium.core.config import load
from tritium.core.trainer import Trainer, TrainingError
from tritium.stages import pretrain

SIZES = ["--model.layers=2", "--model.hidden_size=32", "--model.intermediate_size=64", "--model.heads=2"]
SIZES += ["--model.kv_heads=1", "--model.head_dim=16", "--model.context=96"]
DATA = [
    "--data.bin_tokens=256",
    "--data.bins_per_step=2",
    "--data.holdout=0.1",
    "--run.dtype=fp32",
    "--run.device=cpu",
    "--run.eval_bins=1",
]


def arguments(tiny, out: Path, steps: int, *more: str) -> list[str]:
    """Of a small pretraining that writes often."""
    own = [f"--tokenizer={tiny.model}", f"--data.sources={tiny.data('text.jsonl')}", f"--run.out={out}"]
    return [*own, *SIZES, *DATA, f"--run.steps={steps}", "--run.save_every=5", "--mesh.timeout=20", *more]


def uninterrupted(argv: list[str]) -> None:
    """The same run in the pool."""
    pretrain.train(load(pretrain.Config, argv, "pretrain", ""))


@contextlib.contextmanager
def started(command: list[str], log: Path, **more) -> Iterator[subprocess.Popen]:
    """A command in a session of its own, of which nothing is left. Two cores, so that a rank has one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    cores = sorted(os.sched_getaffinity(0))[:2]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    try:
        yield process
    finally:
        for pid in [*ranks_of(process.pid).values(), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def ranks_of(parent: int) -> dict[int, int]:
    """RANK → process id of the children of torchrun."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, StopIteration):
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                variables = (status.parent / "environ").read_bytes().split(b"\0")
                found[int(next(v for v in variables if v.startswith(b"RANK="))[5:])] = int(status.parent.name)
    return found


def wait_for(happened: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 60.0) -> None:
    """Look again and again, for what another process does."""
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.001)


def step_of(out: Path) -> int:
    """The newest step in the run's metrics."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return json.loads((out / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()[-1])["step"]
    return 0


def saving(out: Path) -> bool:
    return any(out.glob("step-*.tmp/trainer"))


def kill_again_and_again(tiny, pool2, folder: Path, kills: int, seed: int, *more: str) -> None:
    """Kill a random rank at random moments, each third time in the middle of a save; compare with a run left alone."""
    steps, chosen = 12 * (kills + 1), random.Random(seed)
    out, log = folder / "killed", folder / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={kills}"]
    torchrun += [f"--master-port={free_port()}", "-m", "tritium.stages.pretrain"]
    with started([*torchrun, *arguments(tiny, out, steps, *more)], log) as process:
        for kill in range(kills):
            target = 12 * kill + chosen.randrange(6, 11)
            wait_for(lambda target=target: step_of(out) >= target, process, log)
            if kill % 3 == 0:
                wait_for(lambda: saving(out), process, log)
            os.kill(ranks_of(process.pid)[chosen.randrange(2)], signal.SIGKILL)
        assert process.wait(60) == 0, log.read_text()
    assert log.read_text().count("resuming from") == kills, log.read_text()
    pool2.run(uninterrupted, arguments(tiny, folder / "whole", steps, *more))
    assert_same(out, folder / "whole")


def assert_same(out: Path, whole: Path) -> None:
    """Bit for bit, in every tensor of the last checkpoint."""
    last = max(path.name for path in whole.glob("step-*"))
    files = sorted(path.relative_to(whole) for path in (whole / last).rglob("*.safetensors"))
    assert len(files) == 4  # the model and the optimizer's state, of two ranks
    for file in files:
        found, wanted = load_file(out / file), load_file(whole / file)
        assert found.keys() == wanted.keys()
        assert all(found[name].equal(tensor) for name, tensor in wanted.items()), file


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


LIMIT = 9  # mesh.timeout of runs in which a rank hangs


@contextlib.contextmanager
def two_ranks(command: list[str], folder: Path, address: str = "127.0.0.1", before=((), ()), **more):
    """[(process, log)] of two ranks, without torchrun, which would end one where the other is lost."""
    port = str(free_port())
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in (0, 1):
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            place |= {"MASTER_ADDR": address, "MASTER_PORT": port} | more
            log = folder / f"log{rank}"
            ranks.append((stack.enter_context(started([*before[rank], *command], log, **place)), log))
        yield ranks


STUCK = f"""
import os, threading, torch, torch.distributed as dist
from tritium.parallel.mesh import init_mesh
from tritium.parallel.watch import Watch
mesh = init_mesh(device="cpu", timeout={LIMIT})
with Watch(mesh) as watch:
    watch.step = 7
    with watch.phase("reduce" if mesh.main else "load"):
        dist.all_reduce(torch.ones(1), group=mesh.dp_group) if mesh.main else threading.Event().wait()
"""


@pytest.fixture(scope="module", autouse=True)
def stuck(tmp_path_factory) -> Iterator[list]:
    """Two ranks of which one does not come: what they say is asked after they waited beside the rest."""
    with two_ranks([sys.executable, "-c", STUCK], tmp_path_factory.mktemp("stuck")) as ranks:
        yield ranks


def test_killed_three_times_and_the_weights_are_the_same(tiny, pool2, tmp_path):
    kill_again_and_again(tiny, pool2, tmp_path, 3, 0, "--mesh.zero=1")


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["zero=0", "zero=3", "tp=2", "cp=2"])
def test_killed_five_times_on_each_mesh(tiny, pool2, tmp_path, mesh):
    kill_again_and_again(tiny, pool2, tmp_path, 5, len(mesh), f"--mesh.{mesh}")


# ---------------------------------------------------------------------------------------------- ranks that hang


def endless(tiny, out: Path) -> list[str]:
    argv = arguments(
        tiny, out, 10**6, f"--mesh.timeout={LIMIT}", "--run.save_every=1000000", "--run.eval_every=1000000"
    )
    return [sys.executable, "-m", "tritium.stages.pretrain", *argv]


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_stopped_rank_ends_the_other_in_time_and_ends_when_it_goes_on(tiny, tmp_path, stopped):
    with two_ranks(endless(tiny, tmp_path / "out"), tmp_path) as ranks:
        (victim, victims_log), (other, log) = ranks[stopped], ranks[1 - stopped]
        wait_for(lambda: step_of(tmp_path / "out") >= 5, other, log)
        os.kill(victim.pid, signal.SIGSTOP)
        assert other.wait(1.5 * LIMIT) == 1
        if stopped:
            words = r"rank 1 is lost: not heard of for \d+ s. It was last in step \d+, [a-z ]+, and did not come to "
            words += r"collective \d+ of the (world|dp \(ranks 0, 1\)) group, where rank 0 waits"
        else:
            words = r"rank 1, in step \d+, [a-z ]+, has lost rank 0 or its host: the run's store there has not answered"
        assert re.search(words, log.read_text()), log.read_text()
        os.kill(victim.pid, signal.SIGCONT)
        assert victim.wait(2 * LIMIT) == 1 and "tritium: " in victims_log.read_text(), victims_log.read_text()


def test_a_rank_that_lives_but_does_not_come_is_named_with_the_collective(stuck):
    for process, log in stuck:
        assert process.wait(5 * LIMIT) == 1, log.read_text()
        words = r"rank 1 is lost: nothing new from it for \d+ s. It was last in step 7, load, and did not come to "
        words += r"collective \d+ of the dp \(ranks 0, 1\) group, where rank 0 waits"
        assert re.search(words, log.read_text()), log.read_text()


# ---------------------------------------------------------------------------------------------- two hosts


@pytest.fixture
def two_hosts() -> Iterator[tuple[list[str], list[str], Callable[[], None]]]:
    """What to put before a command for it to run on either of two network namespaces, and what cuts their link."""
    names = [f"tritium-{os.getpid()}-{side}" for side in "ab"]
    run = lambda *command: subprocess.run(["ip", *command], check=True, capture_output=True)  # noqa: E731
    try:
        try:
            for name in names:
                run("netns", "add", name)
            run("link", "add", "host0", "netns", names[0], "type", "veth", "peer", "name", "host0", "netns", names[1])
            for number, name in enumerate(names, 1):
                run("-n", name, "address", "add", f"10.99.0.{number}/24", "dev", "host0")
                for device in ("lo", "host0"):
                    run("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"NO NETWORK NAMESPACES HERE, so a cut link is not tested: {error}")
        before = [["ip", "netns", "exec", name] for name in names]
        yield *before, lambda: run("-n", names[0], "link", "set", "host0", "down")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.long
def test_a_cut_link_ends_both_hosts_in_time(tiny, tmp_path, two_hosts):
    *before, cut = two_hosts
    command = endless(tiny, tmp_path / "out")
    with two_ranks(command, tmp_path, "10.99.0.1", before, GLOO_SOCKET_IFNAME="host0") as ranks:
        wait_for(lambda: step_of(tmp_path / "out") >= 5, *ranks[0])
        cut()
        for process, log in ranks:
            assert process.wait(2 * LIMIT) == 1, log.read_text()
        assert "rank 1 is lost: not heard of" in ranks[0][1].read_text()
        assert "has lost rank 0 or its host" in ranks[1][1].read_text()


# ---------------------------------------------------------------------------------------------- signals, divergence


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_to_one_rank_is_a_checkpoint_of_all(tiny, tmp_path, number, code):
    with two_ranks(endless(tiny, tmp_path / "out"), tmp_path) as ranks:
        wait_for(lambda: step_of(tmp_path / "out") >= 5, *ranks[0])
        os.kill(ranks[1][0].pid, number)
        codes = [process.wait(2 * LIMIT) for process, _ in ranks]
    assert codes == [130, code], [log.read_text() for _, log in ranks]
    (folder,) = (tmp_path / "out").glob("step-*")
    assert damage(folder) == "" and int(folder.name[5:]) >= 5


def diverging(argv: list[str]) -> str:
    """A run on whose rank 1 a bit flips after step 3; what it says."""
    step = Trainer.step

    def flipping(trainer, *args):
        step(trainer, *args)
        if trainer.index == 3 and trainer.mesh.rank == 1:
            trainer.flat["policy"].flats[0].part.view(torch.int32)[55] ^= 1

    with mock.patch.object(Trainer, "step", flipping):
        try:
            uninterrupted(argv)
        except TrainingError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("check", [2, 100])
def test_one_flipped_bit_on_one_rank_ends_the_run_at_the_next_check(tiny, pool2, tmp_path, check):
    argv = arguments(tiny, tmp_path, 6, f"--run.check_every={check}")
    said = pool2.run(diverging, argv)
    if check == 2:
        assert all(
            "after step 4 the parameters of rank 1 differ from those of the other ranks" in text for text in said
        )
    else:
        assert said == ["", ""]


def test_so_does_one_in_a_replica_of_a_part_at_level_3(tiny, pool4, tmp_path):
    argv = arguments(
        tiny, tmp_path, 6, "--run.check_every=2", "--mesh.zero=3", "--mesh.shard=2", "--data.bins_per_step=4"
    )
    said = pool4.run(diverging, argv)
    assert all("after step 4 the parameters of rank 3 differ from those of the other ranks" in text for text in said)
