"""What frozen models said, kept on disk over epochs: a reference's log-probs, a teacher's likeliest tokens."""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from tritium.core.batch import PackedBatch
from tritium.core.config import UserError
from tritium.parallel.mesh import Mesh


class Kept:
    """Arrays by the content that they are of: `sequence_keys`. In a file, so that memory does not grow with the data;
    without a name, in a temporary one. Each rank has a file of its own."""

    def __init__(self, file: str = ""):
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        self.file, self.db = file, sqlite3.connect(file)

    def rows(self, keys: Sequence[bytes]) -> list[tuple[bytes] | None]:
        self.db.execute("PRAGMA synchronous=OFF")
        self.db.execute("CREATE TABLE IF NOT EXISTS kept (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        return [self.db.execute("SELECT value FROM kept WHERE key = ?", (key,)).fetchone() for key in keys]

    def get(self, keys: Sequence[bytes], dtype: type) -> list[np.ndarray | None]:
        """What was put under each key, [n] of a dtype; None under a new one. A damaged file is begun anew: what was in
        it can be computed again. Raises: UserError where the file can't be used."""
        try:
            rows = self.rows(keys)
        except sqlite3.OperationalError as error:  # locked, say, or on a full disk: not damaged
            raise UserError(f"{self.file} can't be used: {error}") from None
        except sqlite3.DatabaseError:
            self.db.close()
            os.unlink(self.file)
            self.db = sqlite3.connect(self.file)
            rows = self.rows(keys)
        return [row and np.frombuffer(row[0], dtype) for row in rows]

    def put(self, keys: Iterable[bytes], values: Iterable[np.ndarray]) -> None:
        """Raises: UserError where the disk is full."""
        rows = [(key, value.tobytes()) for key, value in zip(keys, values, strict=True)]
        try:
            with self.db:
                self.db.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", rows)
        except sqlite3.OperationalError as error:
            raise UserError(f"{self.file} can't be written: {error}; free some space") from None

    def fill(
        self, batches: Sequence[PackedBatch], ask: Callable[[PackedBatch], list[Tensor]], dtype: type, mesh: Mesh
    ) -> None:
        """Ask the model, which `ask` gives an array a sequence, about each batch with a sequence that is new: on all
        ranks that run a forward pass together, where it is so on any of them. A collective."""
        keys = [sequence_keys(batch) for batch in batches]
        new = [any(value is None for value in self.get(own, dtype)) for own in keys]
        told = mesh.gather_objects((mesh.dp_rank, new)) if mesh.world_size > 1 else [(0, new)]
        together = [new for rank, new in told if mesh.zero == 3 or rank == mesh.dp_rank]
        for batch, own, *wanted in zip(batches, keys, *together, strict=True):
            if any(wanted):
                self.put(own, [np.asarray(value.cpu(), dtype) for value in ask(batch)])


def kept_file(out: str, folder: str, mesh: Mesh, *asked: object) -> str:
    """Where a run's rank keeps what the model in `folder` said, `asked` so: another place for other weights."""
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(Path(folder).glob("*.safetensors"))]
    digest = hashlib.sha256(repr((os.path.abspath(folder), stats, asked)).encode()).hexdigest()[:12]
    return f"{out}/cache/{digest}-{mesh.rank}.sqlite"


def sequence_keys(batch: PackedBatch) -> list[bytes]:
    """What names a sequence: its tokens, and which of them are supervised."""
    tokens, on = batch.tokens.cpu().numpy(), (batch.weights > 0).cpu().numpy()
    ends = batch.cu_seqlens[: batch.sequences + 1].tolist()
    spans = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    return [hashlib.blake2b(tokens[s].tobytes() + on[s].tobytes(), digest_size=16).digest() for s in spans]
