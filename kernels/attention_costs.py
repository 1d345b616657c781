"""What `attention` spends and moves on a shape of its OpSpec: arithmetic on documents, without a GPU or a tensor.

Shapes: documents of N queries (the last may be shorter), and of M keys where that is another number; options as ints.
"""

from tritium.kernels.registry import Shape


def ends_of(shape: Shape) -> tuple[list[int], list[int]]:
    """Where the documents end, in queries and in keys."""
    documents = range(max(1, -(-shape["T"] // shape["N"])) + 1)
    ends = [min(i * shape["N"], shape["T"]) for i in documents]
    return ends, [i * shape["M"] for i in documents] if "M" in shape else ends


def seen(shape: Shape, of_keys: bool = False) -> list[tuple[int, int]]:
    """What `_attention_intervals` finds: for each query its interval of keys, or for each key its queries."""
    reach = shape.get("window", 2**31) - 1
    left, right = reach, 0 if shape.get("causal", 1) else reach
    ends, ends_k = ends_of(shape)
    if of_keys:
        ends, ends_k, left, right = ends_k, ends, right, left
    found = []
    for first, last, start, end in zip(ends, ends[1:], ends_k, ends_k[1:], strict=False):
        for same in range(first + end - last, end):
            low = max(start, same - left)
            found.append((low, max(low, min(end, same + right + 1))))
    return found


def pairs(shape: Shape) -> int:
    """Pairs of a query and a key that it sees, times heads."""
    return shape["H"] * sum(end - start for start, end in seen(shape))


def moved(shape: Shape, itemsize: int, queries: int, keys: int) -> int:
    """Bytes of `queries` tensors like q, `keys` tensors like k, and lse."""
    T, Tk = (ends[-1] for ends in ends_of(shape))
    return (queries * T * shape["H"] + keys * Tk * shape["G"]) * shape["D"] * itemsize + 4 * T * shape["H"]
