"""Places that a stage writes to, made before its work begins: a path that can't be written should not cost an hour."""

import tempfile
from pathlib import Path

from tritium.core.config import UserError


def make_folder(folder: str | Path, option: str) -> Path:
    """The folder, made where it is missing. Raises: UserError naming `option` where nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # the only honest answer: permissions, read-only mounts, quotas
            pass
    except OSError as error:
        raise UserError(f"{option}={folder} can't be written: {error.strerror}") from None
    return Path(folder)


def make_room_for(file: str, option: str) -> Path:
    """The file's path, its folder made where it is missing. Raises: UserError naming `option`, as `make_folder`."""
    make_folder(Path(file).parent, option)
    if Path(file).is_dir():
        raise UserError(f"{option}={file} is a folder: name a file")
    return Path(file)
