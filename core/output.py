"""Places that a stage writes to, made before its work begins: a path that can't be written should not cost an hour.
And files that are there whole or not at all."""

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tritium.core.config import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # numpy tells no number


@contextmanager
def alone(folder: Path, option: str) -> Iterator[None]:
    """Hold a folder against other processes: two runs in it would cut each other's files. A dead one holds nothing.

    Raises: UserError naming `option` where another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # else: a file system without locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{option}={folder}: another process writes there; wait, or name another") from None
        yield


def make_folder(folder: str | Path, option: str, now: bool = True) -> Path:
    """The folder, made where it is missing; or, where that is not to be `now`, only tried.

    Raises: UserError naming `option` where nothing can be written there.
    """
    path = Path(folder)
    try:
        if now:
            path.mkdir(parents=True, exist_ok=True)
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):  # the only honest answer: permissions, read-only mounts, quotas
            pass
    except OSError as error:
        raise UserError(f"{option}={folder} can't be written: {error.strerror}") from None
    return path


def make_room_for(file: str, option: str) -> Path:
    """The file's path, its folder made where it is missing. Raises: UserError naming `option`, as `make_folder`."""
    make_folder(Path(file).parent, option)
    if Path(file).is_dir():
        raise UserError(f"{option}={file} is a folder: name a file")
    return Path(file)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is whole, and on the disk: no reader sees half of it, no two writers mix.
    Raises: UserError where it can't be written."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with hidden.open("wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(path)
    except OSError as error:
        if error.errno not in FULL and error.filename not in (str(hidden), str(path.parent)):
            raise  # of what is read meanwhile
        raise UserError(f"{path} can't be written: {error.strerror or error}; free some space") from None
    finally:
        hidden.unlink(missing_ok=True)


def write_lines(path: Path, rows: Iterable[dict]) -> int:
    """A .jsonl file of rows, and their number; as `whole_file`."""
    count = 0
    with whole_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def write_array(path: Path, array: np.ndarray) -> None:
    """A .npy file; as `whole_file`."""
    with whole_file(path) as file:
        np.save(file, array)
