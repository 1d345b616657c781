"""Make one Hugging Face folder of a checkpoint: without the trainer's state, in files of a few gigabytes.

    tritium consolidate runs/pretrain out/model        # a run's newest undamaged checkpoint, or one that is named

Many ranks write many files, and most of a checkpoint is the optimizer's. Tensors are read and written one file at a
time: a model of any size needs no more memory than that.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tritium.core.checkpoint import MANIFEST, damage, model_folder
from tritium.core.config import UserError
from tritium.model.adapters import ADAPTER_CONFIG
from tritium.model.hf import INDEX
from tritium.parallel.files import Share, TensorFileError, file_name, open_tensors, tensor_files
from tritium.stages.cli import run_stage
from tritium.stages.surgery import new_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder and say where. Raises: UserError for a damaged checkpoint, or a folder that holds a model."""
    parser = argparse.ArgumentParser(prog="tritium consolidate", description=__doc__.partition("\n")[0])
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="folder of a run (its newest), or of a checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of a file, about (default: 5)")
    arguments = parser.parse_args(argv)
    if not arguments.gigabytes > 0:
        raise UserError(f"--gigabytes={arguments.gigabytes} must be positive")
    if not Path(arguments.source).is_dir():
        raise UserError(f"RUN_OR_CHECKPOINT={arguments.source}: there is no such folder")
    source, out = Path(model_folder(arguments.source)), new_folder(arguments.out)
    if (source / ADAPTER_CONFIG).exists():
        raise UserError(f"{source} is an adapter: `tritium surgery merge` makes one model of it and its base")
    if (source / MANIFEST).exists() and (problem := damage(source, without="trainer")):
        raise UserError(f"{source} is damaged: {problem}; name another checkpoint")
    try:
        consolidate(source, out, arguments.gigabytes * 1e9)
    except (TensorFileError, OSError) as error:
        raise UserError(f"{source} → {out}: {error}") from None
    print(out, file=sys.stderr)
    return 0


def consolidate(source: Path, out: Path, limit: float) -> None:
    """Copy a model's folder, its tensors in files of about `limit` bytes."""
    with open_tensors(source, "model") as tensors:
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}  # mapped, and let go
        files = list(cut(sizes, limit))
        names = [file_name("model", part, len(files)) for part in range(len(files))]
        places = {tensor: name for name, members in zip(names, files, strict=True) for tensor in members}
        out.mkdir(parents=True, exist_ok=True)
        for name, members in zip(names, files, strict=True):
            share = Share(name, {tensor: tensors[tensor] for tensor in members}, places, sum(sizes.values()))
            share.write(out)
    if len(files) > 1:
        (out / INDEX).write_text(share.index())
    left_out = {MANIFEST, INDEX, *(path.name for path in tensor_files(source, "model"))}
    for path in source.iterdir():
        if path.is_file() and path.name not in left_out:
            shutil.copyfile(path, out / path.name)


def cut(sizes: dict[str, int], limit: float) -> Iterator[list[str]]:
    """The tensors' names in runs of at most `limit` bytes, or of one tensor."""
    run: list[str] = []
    for name, size in sizes.items():
        if run and sum(sizes[other] for other in run) + size > limit:
            yield run
            run = []
        run.append(name)
    yield run


if __name__ == "__main__":
    raise SystemExit(run_stage("consolidate"))
