"""Tensors in safetensors files: dealt out to the ranks, written by each for itself, read one by one on any mesh.

    share = deal(tensors, "model", mesh)      # a collective where making a tensor whole is one; copies what is ours
    share.write(folder)                       # model-00002-of-00004.safetensors, on rank 1
    with open_tensors(folder, "model") as tensors:
        tensors["lm_head.weight"]             # read from whichever file has it, when it is asked for

The files hold whole tensors and no mesh. No rank has more than its share of them on the host, and of what is dealt one
tensor at a time on its device. All ranks must see the same folder.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tritium.parallel.mesh import Mesh

REMAP = 1 << 25  # bytes that are read before a file is mapped anew


class TensorFileError(ValueError):
    """A file of tensors that is missing or damaged."""


@dataclass
class Share:
    """What one rank writes of a stream of tensors, and where all of them will be."""

    file: str  # empty where this rank has nothing to write
    tensors: dict[str, Tensor]  # of this rank, copied to the host
    places: dict[str, str]  # tensor → file, of all ranks
    bytes: int  # of all ranks

    def write(self, folder: Path) -> None:
        """Raises: OSError or SafetensorError where there is no room."""
        if self.file:
            save_file(self.tensors, folder / self.file, metadata={"format": "pt"})

    def index(self) -> str:
        """The text of Hugging Face's model.safetensors.index.json."""
        return json.dumps({"metadata": {"total_size": self.bytes}, "weight_map": self.places}, indent=2) + "\n"


def deal(tensors: Iterable[tuple[str, Tensor]], stem: str, mesh: Mesh, *, one_file: bool = False) -> Share:
    """Each tensor to the rank that has the fewest bytes so far, or all to rank 0. Every rank must go through the same
    stream."""
    files = [file_name(stem, rank, mesh.world_size) for rank in range(mesh.world_size)]
    if one_file:
        files = [file_name(stem, 0, 1), *[""] * (mesh.world_size - 1)]
    sizes, places, own = [0] * mesh.world_size, {}, {}
    for name, tensor in tensors:
        rank = 0 if one_file else min(range(mesh.world_size), key=sizes.__getitem__)
        sizes[rank] += tensor.nbytes
        places[name] = files[rank]
        if rank == mesh.rank:
            own[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return Share(files[mesh.rank], own, places, sum(sizes))


def file_name(stem: str, part: int, parts: int) -> str:
    return f"{stem}.safetensors" if parts == 1 else f"{stem}-{part + 1:05d}-of-{parts:05d}.safetensors"


def tensor_files(folder: Path, stem: str) -> list[Path]:
    """The files of a folder that hold what was dealt as `stem`."""
    return sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-?????-of-?????.safetensors")])


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, each read when it is asked for, from a map of its file. The pages that
    were read count as this process's memory while they are mapped: so a file is mapped anew after REMAP bytes."""

    def __init__(self, where: dict[str, Path]):
        self.where, self.file, self.map, self.read = where, None, None, 0

    def __getitem__(self, name: str) -> Tensor:
        if self.where[name] != self.file or self.read > REMAP:
            self.map, self.read, self.file = None, 0, self.where[name]  # unmapped first
            self.map = safe_open(self.file, framework="pt")
        tensor = self.map.get_tensor(name)
        self.read += tensor.nbytes
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


@contextmanager
def open_tensors(folder: Path, stem: str) -> Iterator[TensorFiles]:
    """What was dealt as `stem`. Raises: TensorFileError naming what is missing or damaged."""
    files, where = tensor_files(folder, stem), {}
    if not files:
        raise TensorFileError(f"{folder} has no {stem}*.safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                where |= dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError) as error:
            raise TensorFileError(f"{file} is damaged: {error}") from None
    yield TensorFiles(where)
