"""FLOPs and bytes of `attention` on a shape of its OpSpec: arithmetic on document lengths, without tensors.

Shapes: documents of N queries (the last may be shorter), and of M keys if that differs; options are ints.
"""

from tritium.kernels.attention_mask import Options
from tritium.kernels.registry import Shape


def ends_of(shape: Shape) -> tuple[list[int], list[int]]:
    """The documents' bounds, in queries and in keys."""
    documents = range(max(1, -(-shape["T"] // shape["N"])) + 1)
    ends = [min(i * shape["N"], shape["T"]) for i in documents]
    return ends, [i * shape["M"] for i in documents] if "M" in shape else ends


def pairs(shape: Shape) -> int:
    """The number of visible (query, key) pairs, times query heads."""
    options = Options(bool(shape.get("causal", 1)), shape.get("window"), None, 1.0)
    ends, ends_k = ends_of(shape)
    sizes = [(b - a, d - c) for a, b, c, d in zip(ends, ends[1:], ends_k, ends_k[1:], strict=False)]
    keys = [options.keys_of(slice(i, i + 1), n, m) for n, m in sizes for i in range(n)]
    return shape["H"] * sum(max(0, each.stop - each.start) for each in keys)


def moved(shape: Shape, itemsize: int, queries: int, keys: int) -> int:
    """Bytes of `queries` tensors like q, `keys` tensors like k, and one lse."""
    T, Tk = (ends[-1] for ends in ends_of(shape))
    return (queries * T * shape["H"] + keys * Tk * shape["G"]) * shape["D"] * itemsize + 4 * T * shape["H"]


COSTS = {
    "shape": {"T": 4096, "N": 2048, "H": 32, "G": 8, "D": 128},
    "flops": lambda shape: 4 * shape["D"] * pairs(shape),
    "bytes": lambda shape, itemsize: moved(shape, itemsize, 2, 2),
    "backward_flops": lambda shape: 10 * shape["D"] * pairs(shape),
    "backward_bytes": lambda shape, itemsize: moved(shape, itemsize, 4, 4),
}
