"""What the kernels may move on the shapes of LEAN: the least, or the model that an op's docstring derives.

A model takes (shape, itemsize) and gives the bytes of the forward and of the backward pass, with the blocks of sm_80,
which are those under the interpreter.
"""

import importlib

import torch

from tritium.kernels import all_ops, attention_costs
from tritium.kernels.backend import TARGETS, triton
from tritium.kernels.head_triton import shares_of

OPS = all_ops()
SM_80 = TARGETS["sm_80"]


def file(name):
    return importlib.import_module(f"tritium.kernels.{name}")


def of_width(itemsize):
    return torch.float32 if itemsize == 4 else torch.bfloat16


def seen(shape, of_keys=False):
    """What attention_mask.py finds: for each query its interval of keys, or for each key its queries."""
    reach = shape.get("window", 2**31) - 1
    left, right = reach, 0 if shape.get("causal", 1) else reach
    ends, ends_k = attention_costs.ends_of(shape)
    if of_keys:
        ends, ends_k, left, right = ends_k, ends, right, left
    found = []
    for first, last, start, end in zip(ends, ends[1:], ends_k, ends_k[1:], strict=False):
        for same in range(first + end - last, end):
            low = max(start, same - left)
            found.append((low, max(low, min(end, same + right + 1))))
    return found


def attention(shape, itemsize):
    """Blocks read [first start, last end) of what their tokens see."""
    module = file("attention")
    configs = {name: module._config(name, shape["D"], of_width(itemsize), SM_80) for name in module.KERNELS}
    blocks = {name: config["BLOCK_N" if name == "dkv" else "BLOCK_M"] for name, config in configs.items()}
    (ends, ends_k), H, row = attention_costs.ends_of(shape), shape["H"], shape["D"] * itemsize
    T, Tk = ends[-1], ends_k[-1]
    parts = H // module._heads(Tk, H, shape["G"], blocks["dkv"])

    def walked(kernel):
        rows, intervals = blocks[kernel], seen(shape, kernel == "dkv")
        bounds = (list(zip(*intervals[i : i + rows], strict=True)) for i in range(0, len(intervals), rows))
        return H * sum(max(end) - min(start) for start, end in bounds)

    search = 4 * ((len(ends) - 1).bit_length() + 4 + 2)  # bytes for a token's interval; each program reads 8 again
    forward = T * search + 8 * T * H + attention_costs.moved(shape, itemsize, 2, 0) + walked("forward") * 2 * row
    dq = 8 * T * H + attention_costs.moved(shape, itemsize, 4, 0) + 4 * T * H + walked("dq") * 2 * row
    written = row if parts == shape["G"] else 4 * shape["D"]  # partial sums are fp32
    dkv = Tk * parts * (8 + 2 * row + 2 * written) + walked("dkv") * (2 * row + 8)
    return forward, (T + Tk) * search + dq + dkv


def decode_attention(shape, itemsize):
    """Besides what must move the page of each key, a length for each program, o_s and lse_s out and in."""
    B, H, G, D = (shape[x] for x in "BHGD")
    keys = min(shape["N"] * shape["page"], shape.get("window", shape["N"] * shape["page"]))
    S = file("decode_attention")._shares(B * G, keys)
    parts = 4 * B * H * (2 * S * (D + 1)) if S > 1 else 4 * B * H
    own = OPS["decode_attention"].bytes(shape, itemsize)
    return own + 4 * B * G * (keys + S) + parts + (S - 1) * B * H * D * itemsize, 0


def lora_linear(s, itemsize):
    """Of the matmul, forward and for dx, with a dense base."""
    config = file("lora_linear")._config(s["T"], s["R"], torch.bfloat16, False, False, False, SM_80)

    def matmul(T, K, N):
        tiles_t, tiles_n = triton.cdiv(T, config["BM"]), triton.cdiv(N, config["BN"])
        return itemsize * ((K + s["R"]) * (T * tiles_n + N * tiles_t) + T * N)

    return matmul(s["T"], s["E"], s["F"]), matmul(s["T"], s["F"], s["E"])


def head(shape, itemsize):
    """With three [T] from each share of the forward, four to each tile of the backward."""
    T, V, E = shape["T"], shape["V"], shape["E"]
    config = file("head_triton")._config(E, 1, of_width(itemsize), False, SM_80)
    block_t, block_v = config["BLOCK_T"], config["BLOCK_V"]
    tiles, blocks = triton.cdiv(T, block_t), triton.cdiv(V, block_v)
    operands = tiles * blocks * (block_t + block_v) * E * itemsize + 8 * T * blocks  # and targets
    forward = operands + 4 * T * (3 * shares_of(T, V, config)[0] + 1)
    return forward, operands + T * blocks * block_v * itemsize + 4 * 4 * T * blocks


def linear_kl(shape, itemsize):
    T, V, config = shape["T"], shape["V"], file("linear_kl")._config(itemsize, SM_80)
    tiles, blocks = triton.cdiv(T, config["BLOCK_T"]), triton.cdiv(V, config["BLOCK_V"])
    walk = itemsize * 3 * shape["E"] * tiles * blocks * (config["BLOCK_T"] + config["BLOCK_V"])
    parts = 4 * T * shares_of(T, V, config, file("linear_kl").SHARE)[0]
    return walk + 5 * parts, walk + itemsize * T * blocks * config["BLOCK_V"] + 5 * 4 * T * blocks


def least(name, shape, itemsize):
    spec = OPS[name]
    return spec.bytes(shape, itemsize), spec.backward_bytes(shape, itemsize) if spec.differentiable else 0


MODELS = {
    "attention": attention,
    "decode_attention": decode_attention,
    "gae": lambda s, itemsize: (s["T"] * (3 * itemsize + 8), 0),  # V_t and V_{t+1} are loaded apart
    "linear_cross_entropy": head,
    "linear_kl": linear_kl,
    "linear_logprob": head,
    "lora_linear": lora_linear,
    "segment_sum": lambda s, itemsize: (s["T"] * itemsize, s["T"] * itemsize),
}
LEAN = {
    "adamw_": {"N": 1 << 15},
    "attention": {"T": 512, "N": 256, "H": 2, "G": 1, "D": 64},
    "cross_entropy": {"T": 20, "V": 1000},
    "decode_attention": {"B": 2, "N": 3, "page": 100, "H": 4, "G": 2, "D": 40, "full": 1},
    "dequantize_nf4": {"N": 64, "K": 256},
    "gae": {"T": 1000, "S": 3},
    "geglu": {"T": 37, "F": 1030, "fused": 1},
    "global_norm": {"N": 1 << 15},
    "linear_cross_entropy": {"T": 256, "E": 128, "V": 512},
    "linear_kl": {"T": 130, "E": 64, "V": 300},
    "linear_logprob": {"T": 256, "E": 128, "V": 512},
    "lora_linear": {"T": 256, "E": 128, "F": 256, "R": 16},
    "rms_norm": {"T": 2048, "E": 128},
    "rope": {"T": 37, "H": 6, "G": 2, "D": 40},
    "segment_sum": {"T": 20_000, "S": 7, "outside": 3},
    "swiglu": {"T": 37, "F": 1030, "fused": 1},
}


def allowed(name, itemsize):
    """(shape, forward bytes, backward bytes) of an op."""
    shape = LEAN[name]
    return shape, *(MODELS[name](shape, itemsize) if name in MODELS else least(name, shape, itemsize))
