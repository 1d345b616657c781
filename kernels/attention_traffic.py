"""What `attention` spends and moves on a shape of its OpSpec: arithmetic on documents, without a GPU or a tensor.

Shapes: documents of N queries (the last may be shorter), and of M keys where that is another number; options as ints.
"""

from tritium.kernels.registry import Shape


def ends_of(shape: Shape) -> tuple[list[int], list[int]]:
    """Where the documents end, in queries and in keys."""
    documents = range(max(1, -(-shape["T"] // shape["N"])) + 1)
    ends = [min(i * shape["N"], shape["T"]) for i in documents]
    return ends, [i * shape["M"] for i in documents] if "M" in shape else ends


def _seen(shape: Shape, of_keys: bool = False) -> list[tuple[int, int]]:
    """What `_attention_intervals` finds: for each query its interval of keys, or for each key its queries."""
    reach = shape.get("window", 2**31) - 1
    left, right = reach, 0 if shape.get("causal", 1) else reach
    ends, ends_k = ends_of(shape)
    if of_keys:
        ends, ends_k, left, right = ends_k, ends, right, left
    seen = []
    for first, last, start, end in zip(ends, ends[1:], ends_k, ends_k[1:], strict=False):
        for same in range(first + end - last, end):
            low = max(start, same - left)
            seen.append((low, max(low, min(end, same + right + 1))))
    return seen


def pairs(shape: Shape) -> int:
    """Pairs of a query and a key that it sees, times heads."""
    return shape["H"] * sum(end - start for start, end in _seen(shape))


def moved(shape: Shape, itemsize: int, queries: int, keys: int) -> int:
    """Bytes of `queries` tensors like q, `keys` tensors like k, and lse."""
    T, Tk = (ends[-1] for ends in ends_of(shape))
    return (queries * T * shape["H"] + keys * Tk * shape["G"]) * shape["D"] * itemsize + 4 * T * shape["H"]


def traffic(shape: Shape, itemsize: int, blocks: dict[str, int], heads: int) -> tuple[int, int]:
    """Bytes as attention.py says, where each token sees something: blocks read [first start, last end).

    `blocks`: the rows that a program of each kernel has; `heads`: how many query heads one of dk and dv sums up.
    """
    (ends, ends_k), H, row = ends_of(shape), shape["H"], shape["D"] * itemsize
    T, Tk, parts = ends[-1], ends_k[-1], H // heads

    def walked(kernel: str) -> int:
        rows, seen = blocks[kernel], _seen(shape, kernel == "dkv")
        bounds = (list(zip(*seen[i : i + rows], strict=True)) for i in range(0, len(seen), rows))
        return H * sum(max(end) - min(start) for start, end in bounds)

    search = 4 * ((len(ends) - 1).bit_length() + 4 + 2)  # bytes for a token's interval; each program reads 8 again
    forward = T * search + 8 * T * H + moved(shape, itemsize, 2, 0) + walked("forward") * 2 * row
    dq = 8 * T * H + moved(shape, itemsize, 4, 0) + 4 * T * H + walked("dq") * 2 * row
    written = row if parts == shape["G"] else 4 * shape["D"]  # partial sums are fp32
    dkv = Tk * parts * (8 + 2 * row + 2 * written) + walked("dkv") * (2 * row + 8)
    return forward, (T + Tk) * search + dq + dkv
