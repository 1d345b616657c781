"""Checkpoints: a folder that transformers can load, and beside it what training needs to go on.

    step-00000200/
      config.json  model*.safetensors  tokenizer…    the first network, as a Hugging Face folder; or, where only
                                                     an adapter is trained, that: adapter_config.json  adapter_model…
      trainer/NETWORK*.safetensors                   masters and AdamW moments, whole tensors: no mesh in them
      trainer/state.json                             step, seeds, the resolved config
      manifest.json                                  size and SHA-256 of every file above

With several ranks each has its share of the tensors and writes files of its own (parallel/files.py). What is saved is
copied to the host, and a thread writes it while training goes on:

    save = Save(folder, mesh, shares, write_small)     # begins
    save.written                                       # on this rank: asked between steps
    save.seal()                                        # once it is so on all of them: manifest, rename

A checkpoint is written under a temporary name, flushed to disk and renamed, so that a name without ".tmp" is whole;
the manifest finds what broke later. No pickle is ever read.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tritium.core.config import UserError
from tritium.model.hf import ADAPTER_CONFIG
from tritium.parallel.files import Share
from tritium.parallel.mesh import Mesh

MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint that can't be written, or does not belong to this run."""


class Save:
    """A checkpoint on its way to the disk. Every rank makes one at the same step, with its shares of all tensors.

    `write_small(folder)` writes what else belongs there, at once and on rank 0 only.
    """

    def __init__(self, folder: Path, mesh: Mesh, shares: Sequence[Share], write_small: Callable[[Path], None]):
        self.folder, self.mesh, self.shares = folder, mesh, list(shares)
        self.temporary = folder.with_name(f"{folder.name}.tmp")
        self.failure: Exception | None = None
        self.entries: dict[str, dict[str, Any]] = {}  # of this rank's files, for the manifest
        small: list[Path] = []
        if mesh.main:
            self.guard(self.make_folder)
            self.guard(lambda: write_small(self.temporary))
            small = [path for path in self.temporary.rglob("*") if path.is_file()]
        mesh.barrier()
        self.thread = threading.Thread(target=self.guard, args=(lambda: self.work(small),), daemon=True)
        self.thread.start()

    def guard(self, action: Callable[[], None]) -> None:
        """Do it and keep the error, unless there has been one."""
        try:
            if self.failure is None:
                action()
        except Exception as error:  # told by `seal`, on all ranks
            self.failure = error

    def make_folder(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)
        (self.temporary / "trainer").mkdir(parents=True)

    def work(self, small: list[Path]) -> None:
        for path in small:
            self.enter(path)
        while self.shares:
            share = self.shares.pop(0)  # its memory goes with it
            share.write(self.temporary)
            if share.file:
                self.enter(self.temporary / share.file)

    def enter(self, path: Path) -> None:
        flush(path)
        entry = {"bytes": path.stat().st_size, "sha256": digest(path)}
        self.entries[str(path.relative_to(self.temporary))] = entry

    @property
    def written(self) -> bool:
        """Whether this rank's files are on the disk, or can't be."""
        return not self.thread.is_alive()

    def seal(self) -> None:
        """Give the checkpoint its name, once all ranks have written their files. A collective, which waits for that.

        Raises: CheckpointError on every rank where the disk of one is full or not writable; what was there before is
        untouched. Whatever else went wrong while this rank wrote.
        """
        self.thread.join()
        said = self.mesh.gather_objects(("" if self.failure is None else str(self.failure), self.entries))
        errors = [f"{error} (rank {rank})" if rank else error for rank, (error, _) in enumerate(said) if error]
        if self.mesh.main and not errors:
            entries = dict(sorted(item for _, entries in said for item in entries.items()))
            self.guard(lambda: self.rename(entries))
            errors += [str(self.failure)] if self.failure else []
        errors = self.mesh.broadcast_object(errors)
        if not errors:
            return
        if self.mesh.main:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if self.failure is not None and not isinstance(self.failure, (OSError, SafetensorError)):
            raise self.failure  # a mistake in the code
        text = f"the checkpoint {self.folder} could not be written: {errors[0]}; free some space, or use --run.out"
        raise CheckpointError(text)

    def rename(self, entries: dict[str, dict[str, Any]]) -> None:
        """Write the manifest, flush what holds the names to disk, and give the folder its name."""
        manifest = self.temporary / MANIFEST
        manifest.write_text(json.dumps(entries, indent=2) + "\n")
        for path in (manifest, self.temporary / "trainer", self.temporary):
            flush(path)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.rename(self.temporary, self.folder)
        flush(self.folder.parent)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, without: str = "", part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint: the first file that is missing or changed; empty if nothing is.

    Files in its folder `without` are not looked at; of the others, only every `parts`-th from `part`.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a bit flipped in it is damage, too
        return f"{MANIFEST} can't be read ({error})"
    names = [name for name in wanted if not (without and name.startswith(without + "/"))]
    for name in names[part::parts]:
        size, checksum = wanted[name]
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if digest(folder / name) != checksum:
                return f"{name} is not what was written (its checksum differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return f"{name} can't be read ({error})"
    return ""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; not a copy by another name, which is the user's."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit())


def latest(folder: Path, mesh: Mesh, warn: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint; damaged ones are told of and passed over. The same on every rank.

    The ranks share the reading of its files.
    """
    for candidate in reversed(mesh.broadcast_object(checkpoints(folder))):
        problems = mesh.gather_objects(damage(candidate, part=mesh.rank, parts=mesh.world_size))
        problem = next(filter(None, problems), "")
        if not problem:
            return candidate
        warn(f"checkpoint {candidate} is damaged: {problem}; trying the one before")
    return None


def prune(newest: Path, keep: int, mesh: Mesh) -> None:
    """Delete all but the last `keep` checkpoints up to `newest`, and what an interrupted save left.

    Those after `newest` go too: the run went on from before them, because they are damaged.
    """
    if mesh.main:
        found = checkpoints(newest.parent)
        end = found.index(newest) + 1
        for old in [*found[: max(end - keep, 0)], *found[end:], *newest.parent.glob("step-*.tmp")]:
            shutil.rmtree(old, ignore_errors=True)


def model_folder(path: str) -> str:
    """The folder of a model that `path` means: a model's own, or that of a run, whose newest undamaged one it is.

    Raises: CheckpointError where all of them are damaged.
    """
    own = any((Path(path) / name).exists() for name in ("config.json", ADAPTER_CONFIG))
    found = [] if own else checkpoints(Path(path))
    for candidate in reversed(found):
        problem = damage(candidate, without="trainer")
        if not problem:
            return str(candidate)
        tell(f"checkpoint {candidate} is damaged: {problem}; trying the one before")
    if found:
        raise CheckpointError(f"{path}: all of its {len(found)} checkpoints are damaged: train it again")
    return path


@cache  # once for each message: a stage asks for a model's folder several times
def tell(message: str) -> None:
    print(message, file=sys.stderr)


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer" / "state.json").read_text())
