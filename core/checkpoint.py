"""Checkpoints: a folder that transformers can load, and beside it what training needs to go on.

    step-00000200/
      config.json  model.safetensors  tokenizer…     the first network, as a Hugging Face folder
      trainer/NETWORK.safetensors                    masters and AdamW moments, whole tensors: no mesh in them
      trainer/state.json                             step, seeds, the resolved config
      manifest.json                                  size and SHA-256 of every file above

A checkpoint is written under a temporary name, flushed to disk and renamed, so that a name without ".tmp" is whole;
the manifest finds what broke later. No pickle is ever read.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tritium.core.config import UserError
from tritium.parallel.mesh import Mesh

MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint that can't be written, or does not belong to this run."""


def save_checkpoint(
    folder: Path,
    mesh: Mesh,
    export: Callable[[str], None],
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
) -> None:
    """Write a checkpoint at `folder`, whole or not at all. Every rank must call it; rank 0 writes.

    `export(folder)` writes the Hugging Face folder, a collective; `tensors` go to trainer/NAME.safetensors.
    Raises: CheckpointError on every rank when the disk is full or not writable; what was there before is untouched.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    error = ""
    try:
        if mesh.main:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "trainer").mkdir(parents=True)
    except OSError as problem:
        error = str(problem)
    error = mesh.broadcast_object(error)  # `export` is a collective: all ranks call it, or none
    error = error or guarded(lambda: export(str(temporary)))
    if mesh.main and not error:
        error = guarded(lambda: write_trainer_state(temporary, tensors, state)) or guarded(
            lambda: seal(temporary, folder)
        )
    error = mesh.broadcast_object(error)
    if error:
        if mesh.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint {folder} could not be written: {error}; free some space, or use --run.out"
        )


def guarded(write: Callable[[], None]) -> str:
    """Run `write`; the reason of its failure, or nothing."""
    try:
        write()
    except Exception as problem:  # safetensors has exceptions of its own for a full disk
        if isinstance(problem, OSError) or "SafetensorError" in type(problem).__name__:
            return str(problem)
        raise
    return ""


def write_trainer_state(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    for name, values in tensors.items():
        save_file({k: v.detach().cpu() for k, v in values.items()}, folder / "trainer" / f"{name}.safetensors")
    (folder / "trainer" / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def seal(temporary: Path, folder: Path) -> None:
    """Write the manifest, flush everything to disk, and give the folder its name."""
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": digest(p)} for p in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*files, temporary / MANIFEST, temporary / "trainer", temporary]:
        flush(path)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, without: str = "") -> str:
    """What is wrong with a checkpoint: the first file that is missing or changed; empty if nothing is.

    Files in its folder `without` are not looked at.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST} can't be read ({error})"
    for name, wanted in manifest.items():
        path = folder / name
        if without and name.startswith(without + "/"):
            continue
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {wanted['bytes']}"
        if digest(path) != wanted["sha256"]:
            return f"{name} is not what was written (its checksum differs)"
    return ""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and not p.name.endswith(".tmp"))


def latest(folder: Path, mesh: Mesh, warn: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint; damaged ones are told of and passed over. The same on every rank."""
    found = None
    if mesh.main:
        for candidate in reversed(checkpoints(folder)):
            problem = damage(candidate)
            if not problem:
                found = candidate
                break
            warn(f"checkpoint {candidate} is damaged: {problem}; trying the one before")
    return mesh.broadcast_object(found)


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
    found = [] if (Path(path) / "config.json").exists() else checkpoints(Path(path))
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


def read_tensors(folder: Path, name: str, device: torch.device) -> dict[str, Tensor]:
    return load_file(folder / "trainer" / f"{name}.safetensors", device=str(device))
