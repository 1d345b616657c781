"""The head's statistics and their gradients in Triton: matmuls whose results never leave the chip.

    z = softcap(hidden @ weight.T) / temperature

    forward     a program multiplies BLOCK_T tokens by its share of the vocabulary, BLOCK_V columns at a time, and keeps
                max z, Σ e^(z - max), Σ e^(z - max) z and Σ z of each token in registers; the shares merge exactly
    backward    for each chunk of the vocabulary, z is recomputed and dz [T, chunk] stored in the operands' dtype;
                dhidden += dz @ weight[chunk] and dweight[chunk] = dz.T @ hidden are left to torch's matmuls

                dz_v = (p_v (g_lse + g_expected (1 + z_v - expected)) + g_total + Σ_k g_picked_k δ(v = target_k)) dz/dx

2·T·V·E FLOPs forward, 6·T·V·E backward. Reads: each tile of BLOCK_T × BLOCK_V logits reads its operands once, in all
T·V·E·itemsize (1 / BLOCK_T + 1 / BLOCK_V) bytes, nearly all from the L2, since programs that run together share
BLOCK_T·GROUP tokens and a few blocks of the vocabulary. On top come a few numbers per token and tile or share, and in
the backward dz, T·V·itemsize.

Rows whose length is not a multiple of 64 are zero-padded in a copy (`aligned`); otherwise each element would be a load
of its own. Sizes that differ from batch to batch are not specialised on: one compilation serves them all.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels.backend import Target, operator, target_of, tl, triton
from tritium.kernels.blocks import tanh
from tritium.kernels.registry import Launch, launch_of

# Bytes of an fp32 tile of logits in the torch path, and of dz in the Triton path. On a CPU a tile should stay in the
# cache (allocations over 32 MB are also returned to the system each time, and their page faults cost more than the
# matmul); a GPU wants large matmuls.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
PROGRAMS = 1024  # least number of programs for the forward: 8 per multiprocessor of a large GPU
SHARE = 8  # most blocks of the vocabulary in a program's share
GROUP = tl.constexpr(16)  # blocks of tokens that run together
EXCLUDED = -1e30  # instead of -inf: a share with nothing else must still have a finite softmax
_EXCLUDED = tl.constexpr(EXCLUDED)
LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is an instruction, exp is two


@triton.jit
def tile_of(i_program, blocks, shares):
    """(block of tokens, share of the vocabulary); GROUP blocks go over the vocabulary together, sharing the L2."""
    i_group = i_program // (GROUP * shares)
    size = tl.minimum(blocks - i_group * GROUP, GROUP)
    i_program = i_program % (GROUP * shares)
    return i_group * GROUP + i_program % size, i_program // size


@triton.jit
def logits_block(
    p_hidden, p_weight, i_row, i_col, stride_hidden, stride_weight, T, V, softcap, temperature,
    E: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """z [BLOCK_T, BLOCK_V] of tokens i_row and vocabulary entries i_col, both int64.

    Loads need no masks: indices beyond T and V are clamped to the last row, which is in the cache, and whose results
    are dropped later; E is a multiple of BLOCK_E (`aligned`).
    """
    i_e = tl.arange(0, BLOCK_E)
    p_h = p_hidden + (tl.minimum(i_row, T - 1) * stride_hidden)[:, None] + i_e[None, :]  # [BLOCK_T, BLOCK_E]
    p_w = p_weight + (tl.minimum(i_col, V - 1) * stride_weight)[None, :] + i_e[:, None]  # [BLOCK_E, BLOCK_V]
    b_z = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for _ in range(0, E, BLOCK_E):
        b_z = tl.dot(tl.load(p_h), tl.load(p_w), b_z, input_precision="ieee")
        p_h += BLOCK_E
        p_w += BLOCK_E
    if HAS_CAP:
        b_z = softcap * tanh(b_z * (1.0 / softcap))
    return b_z * (1.0 / temperature)


@triton.jit
def _columns_of(p_targets, i_row, m_row, i_k, i_first, width, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """(columns, found) of targets i_k, i_k + 1, … in the block of `width` vocabulary entries that starts at i_first.

    columns [BLOCK_T, BLOCK_K]: the target's column, or -1 if it is in another block. found: bit j is set if any row has
    its target i_k + j in this block; few blocks have one, so the rest is skipped.
    """
    i_j = tl.arange(0, BLOCK_K)
    p_target = p_targets + i_row[:, None] * K + (i_k + i_j)[None, :]  # K is a multiple of BLOCK_K
    b_column = tl.load(p_target, mask=m_row[:, None], other=-1) - i_first
    b_column = tl.where((b_column >= 0) & (b_column < width), b_column, -1).to(tl.int32)
    return b_column, tl.sum((tl.max(b_column, 0) >= 0).to(tl.int32) << i_j, 0)


@triton.jit
def _column(b_columns, i_j, BLOCK_K: tl.constexpr):
    """Column i_j of [BLOCK_T, BLOCK_K]: [BLOCK_T]."""
    return tl.max(tl.where((tl.arange(0, BLOCK_K) == i_j)[None, :], b_columns, -1), 1)


@triton.jit(do_not_specialize=["T", "V", "shares", "blocks_per_share"])
def _head_forward(
    p_hidden, p_weight, p_targets, p_picked, p_parts,
    stride_hidden, stride_weight, T, V, shares, blocks_per_share, softcap, temperature,
    E: tl.constexpr, K: tl.constexpr, EXPECTED: tl.constexpr, TOTAL: tl.constexpr, EXCLUDE: tl.constexpr,
    HAS_CAP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [shares, 4, T]: per share max z, Σ e^(z - max), Σ e^(z - max) z and Σ z; picked [T, K] where in the share.

    hidden [T, E], weight [V, E], targets [T, K] int64. Grid: (cdiv(T, BLOCK_T) · shares,).
    """
    i_tile, i_share = tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), shares)
    i_row = i_tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    m_row = i_row < T
    b_max = tl.full([BLOCK_T], _EXCLUDED, tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    b_expected = tl.zeros([BLOCK_T], tl.float32)
    b_total = tl.zeros([BLOCK_T], tl.float32)
    first = i_share * blocks_per_share * BLOCK_V
    for i_start in range(first, tl.minimum(V, first + blocks_per_share * BLOCK_V), BLOCK_V):
        i_block = tl.arange(0, BLOCK_V)  # [BLOCK_V]
        b_z = logits_block(
            p_hidden, p_weight, i_row, (i_start + i_block).to(tl.int64), stride_hidden, stride_weight, T, V,
            softcap, temperature, E, HAS_CAP, BLOCK_T, BLOCK_V, BLOCK_E,
        )  # fmt: skip
        b_z = tl.where((i_start + i_block < V)[None, :], b_z, _EXCLUDED)  # [BLOCK_T, BLOCK_V]
        for i_k in range(0, K, BLOCK_K):
            width = tl.minimum(BLOCK_V, V - i_start)
            b_columns, found = _columns_of(p_targets, i_row, m_row, i_k, i_start, width, K, BLOCK_K)
            for i_j in range(BLOCK_K):
                if (found >> i_j) & 1:
                    b_column = _column(b_columns, i_j, BLOCK_K)
                    b_here = i_block[None, :] == b_column[:, None]
                    b_picked = tl.sum(tl.where(b_here, b_z, 0.0), 1)
                    tl.store(p_picked + i_row * K + i_k + i_j, b_picked, mask=b_column >= 0)
                    if EXCLUDE:
                        b_z = tl.where(b_here, _EXCLUDED, b_z)
        b_top = tl.maximum(b_max, tl.max(b_z, 1))  # [BLOCK_T]
        b_kept = tl.exp2((b_max - b_top) * LOG2_E)
        b_p = tl.exp2((b_z - b_top[:, None]) * LOG2_E)  # [BLOCK_T, BLOCK_V]
        b_sum = b_sum * b_kept + tl.sum(b_p, 1)
        if EXPECTED:
            b_expected = b_expected * b_kept + tl.sum(b_p * b_z, 1)
        if TOTAL:
            b_total += tl.sum(tl.where(b_z > 0.5 * _EXCLUDED, b_z, 0.0), 1)
        b_max = b_top
    i_part = i_share.to(tl.int64) * 4 * T + i_row
    tl.store(p_parts + i_part, b_max, mask=m_row)
    tl.store(p_parts + i_part + T, b_sum, mask=m_row)
    if EXPECTED:
        tl.store(p_parts + i_part + 2 * tl.cast(T, tl.int64), b_expected, mask=m_row)
    if TOTAL:
        tl.store(p_parts + i_part + 3 * tl.cast(T, tl.int64), b_total, mask=m_row)


@triton.jit(do_not_specialize=["T", "V", "i_chunk"])
def _head_dz(
    p_hidden, p_weight, p_targets, p_top, p_g_lse, p_g_expected, p_g_total, p_g_picked, p_dz,
    stride_hidden, stride_weight, stride_dz, T, V, i_chunk, softcap, temperature,
    E: tl.constexpr, K: tl.constexpr, EXPECTED: tl.constexpr, TOTAL: tl.constexpr, EXCLUDE: tl.constexpr,
    HAS_CAP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz of one chunk of the vocabulary, weight [V, E], that starts at entry i_chunk. Grid: (tiles of dz,).

    dz [T, cdiv(V, BLOCK_V) · BLOCK_V]: whole blocks, so that stores need no mask, which would narrow them. The g_* are
    [T], g_picked [T, K], fp32. g_lse includes g_expected · (1 - expected); both include 1 / Σ e^(z - top), since the
    rounding of the log-sum-exp itself exceeds the 1 - p of a confident target; all include 1 / temperature.
    """
    i_tile, i_share = tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V))
    i_row = i_tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    i_block = tl.arange(0, BLOCK_V)
    i_col = (i_share * BLOCK_V + i_block).to(tl.int64)  # [BLOCK_V]
    m_row = i_row < T
    b_z = logits_block(
        p_hidden, p_weight, i_row, i_col, stride_hidden, stride_weight, T, V,
        softcap, temperature, E, HAS_CAP, BLOCK_T, BLOCK_V, BLOCK_E,
    )  # fmt: skip
    b_top = tl.load(p_top + i_row, mask=m_row, other=float("inf"))[:, None]
    b_g = tl.load(p_g_lse + i_row, mask=m_row, other=0.0)[:, None]
    if EXPECTED:
        b_g = b_g + tl.load(p_g_expected + i_row, mask=m_row, other=0.0)[:, None] * b_z
    b_dz = tl.exp2((b_z - b_top) * LOG2_E) * b_g  # [BLOCK_T, BLOCK_V]
    if TOTAL:
        b_dz += tl.load(p_g_total + i_row, mask=m_row, other=0.0)[:, None]
    for i_k in range(0, K, BLOCK_K):
        b_columns, found = _columns_of(p_targets, i_row, m_row, i_k, i_chunk + i_share * BLOCK_V, BLOCK_V, K, BLOCK_K)
        for i_j in range(BLOCK_K):
            if (found >> i_j) & 1:
                b_here = i_block[None, :] == _column(b_columns, i_j, BLOCK_K)[:, None]
                b_g_picked = tl.load(p_g_picked + i_row * K + i_k + i_j, mask=m_row, other=0.0)[:, None]
                # p - 1, in fp32: bf16(p) is 1 from p = 0.998 on
                b_dz = tl.where(b_here, b_g_picked if EXCLUDE else b_dz + b_g_picked, b_dz)
    if HAS_CAP:  # d tanh(x) = 1 - tanh(x)²
        b_tanh = b_z * (temperature / softcap)
        b_dz *= 1.0 - b_tanh * b_tanh
    p_out = p_dz + (i_row * stride_dz)[:, None] + i_col[None, :]
    tl.store(p_out, b_dz.to(p_dz.dtype.element_ty), mask=m_row[:, None])


# Launchers ------------------------------------------------------------------------------------------------------------
def _config(E: int, K: int, dtype: torch.dtype, has_cap: bool, target: Target) -> dict:
    """Launch parameters: the largest tile whose logits, and what is computed from them, fit into registers.

    K > 1 targets are padded to 8, 16, …, so that few values of K are compiled, and searched in groups of BLOCK_K.
    """
    if dtype == torch.float32:  # "ieee" products run outside the tensor cores
        block_v, block_e, stages = 64, 16, 2
    else:
        block_v = 256 if target.arch == 90 and not has_cap and K <= 1 else 128
        # Hopper and Blackwell read matmul operands from shared memory; on other GPUs they take registers too.
        block_e = 64 if target.shared_bytes >= 200 << 10 and not has_cap else 32
        stages = 4 if target.backend == "cuda" else 2
    K, block_k = (K, 1) if K <= 1 else (max(8, triton.next_power_of_2(K)), 8)
    blocks = {"BLOCK_T": 128, "BLOCK_V": block_v, "BLOCK_E": block_e, "BLOCK_K": block_k}
    return {"E": E, "K": K, **blocks, "num_warps": 8, "num_stages": stages}


def tile_bytes(device: torch.device) -> int:
    return TILE_BYTES.get(device.type, TILE_BYTES["cuda"])


def shares_of(T: int, V: int, config: dict, most: int = SHARE) -> tuple[int, int]:
    """(number of shares, blocks per share ≤ `most`) of the vocabulary, for a kernel that sums over it."""
    tiles, blocks = triton.cdiv(T, config["BLOCK_T"]), triton.cdiv(V, config["BLOCK_V"])
    blocks_per_share = max(1, min(most, tiles * blocks // PROGRAMS))
    return triton.cdiv(blocks, blocks_per_share), blocks_per_share


def aligned(x: Tensor) -> Tensor:
    """x [M, E] with unit column stride, rows aligned to 16 elements and bytes, E zero-padded to a multiple of 64."""
    if x.stride(1) == 1 and not (x.shape[1] % 64 or x.stride(0) % 16 or x.data_ptr() % 16):
        return x
    return F.pad(x, (0, -x.shape[1] % 64)).contiguous()


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in at least fp32, without rounding the accumulator to bf16 first where the backend can."""
    if a.dtype.itemsize >= 4:
        return a @ b
    if a.is_cuda and torch.version.cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _forward_outputs(hidden, weight, targets, temperature, softcap, expected, total, exclude):
    T = hidden.shape[0]
    shapes = (T,), tuple(targets.shape), (T if expected else 0,), (T if total else 0,), (T,), (T,)
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)


@operator("head_forward", _forward_outputs)
def head_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None, expected: bool,
    total: bool, exclude: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """lse [T], picked [T, K], expected and total ([T], or [0] if not wanted), top and Σ e^(z - top) [T]; all fp32."""
    (T, K), V = targets.shape, weight.shape[0]
    hidden, weight = aligned(hidden), aligned(weight)
    config = _config(hidden.shape[1], K, hidden.dtype, softcap is not None, target_of(hidden.device))
    shares, blocks_per_share = shares_of(T, V, config)
    parts = hidden.new_empty(shares, 4, T, dtype=torch.float32)
    targets = F.pad(targets, (0, config["K"] - K), value=-1).contiguous()
    picked = hidden.new_zeros(T, config["K"], dtype=torch.float32)
    if T:
        _head_forward[(triton.cdiv(T, config["BLOCK_T"]) * shares,)](
            hidden, weight, targets, picked, parts,
            hidden.stride(0), weight.stride(0), T, V, shares, blocks_per_share, softcap or 0.0, temperature,
            EXPECTED=expected, TOTAL=total, EXCLUDE=exclude, HAS_CAP=softcap is not None, **config,
        )  # fmt: skip
    part_top, part_sum, part_expected, part_total = parts.unbind(1)  # [shares, T] each
    top = part_top.amax(0)
    scale = (part_top - top).exp_()
    total_sum = (scale * part_sum).sum(0)
    mean = (scale * part_expected).sum(0) / total_sum if expected else top.new_empty(0)
    total_z = part_total.sum(0) if total else top.new_empty(0)
    return top + total_sum.log(), picked[:, :K].contiguous(), mean, total_z, top, total_sum


def gradients_by_chunks(
    make_dz: Callable[[slice, Tensor], None], hidden: Tensor, weight: Tensor, block: int, needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dhidden [T, E] and dweight [V, E] in the inputs' dtype ([0] if not needed), by chunks of the vocabulary.

    `make_dz(entries, dz)` fills dz [T, whole blocks of `block` entries]; TILE_BYTES sets the size of a chunk.
    """
    T, V = hidden.shape[0], weight.shape[0]
    blocks = min(triton.cdiv(V, block), max(1, tile_bytes(hidden.device) // (hidden.itemsize * max(T, 1) * block)))
    dz = hidden.new_empty(T, blocks * block)
    dhidden = hidden.new_zeros(hidden.shape if needs_hidden else 0, dtype=torch.float32)
    dweight = weight.new_zeros(weight.shape if needs_weight else 0)
    for start in range(0, V if T else 0, blocks * block):
        entries = slice(start, min(V, start + blocks * block))
        make_dz(entries, dz)
        part = dz[:, : entries.stop - start]
        if needs_hidden:
            dhidden += matmul_fp32(part, weight[entries])
        if needs_weight:  # straight from the accumulator: rounded once
            torch.mm(part.t(), hidden, out=dweight[entries])
    return dhidden.to(hidden.dtype), dweight


def _backward_outputs(g_lse, g_picked, g_expected, g_total, hidden, weight, *rest):
    *_, needs_hidden, needs_weight = rest
    return hidden.new_empty(hidden.shape if needs_hidden else 0), weight.new_empty(weight.shape if needs_weight else 0)


@operator("head_backward", _backward_outputs)
def head_backward(
    g_lse: Tensor | None, g_picked: Tensor | None, g_expected: Tensor | None, g_total: Tensor | None, hidden: Tensor,
    weight: Tensor, targets: Tensor, expected: Tensor, top: Tensor, total_sum: Tensor, temperature: float,
    softcap: float | None, exclude: bool, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dhidden [T, E] and dweight [V, E] in the inputs' dtype; [0] if not needed."""
    (T, K), rows, table = targets.shape, aligned(hidden), aligned(weight)
    config = _config(rows.shape[1], K, hidden.dtype, softcap is not None, target_of(hidden.device))
    g_lse = torch.zeros_like(top) if g_lse is None else g_lse
    if g_expected is not None:
        g_lse, g_expected = g_lse + g_expected * (1 - expected), g_expected / total_sum
    g_lse = g_lse / total_sum
    g_picked = top.new_zeros(T, K) if g_picked is None else g_picked
    targets, g_picked = (F.pad(x, (0, config["K"] - K), value=-1) for x in (targets, g_picked))
    # In place of a missing gradient g_lse is passed; the kernel does not read it.
    gradients = [(g_lse if g is None else g) / temperature for g in (g_lse, g_expected, g_total, g_picked)]
    vectors = [x.contiguous() for x in (targets, top, *gradients)]
    flags = {"EXPECTED": g_expected is not None, "TOTAL": g_total is not None, "EXCLUDE": exclude}

    def make_dz(entries: slice, dz: Tensor) -> None:
        chunk = table[entries]
        V = chunk.shape[0]
        _head_dz[(triton.cdiv(T, config["BLOCK_T"]) * triton.cdiv(V, config["BLOCK_V"]),)](
            rows, chunk, *vectors, dz,
            rows.stride(0), chunk.stride(0), dz.stride(0), T, V, entries.start, softcap or 0.0, temperature,
            **flags, HAS_CAP=softcap is not None, **config,
        )  # fmt: skip

    return gradients_by_chunks(make_dz, hidden, weight, config["BLOCK_V"], needs_hidden, needs_weight)


def head_launches(target: Target, dtype: str, *flags: str, K: int = 1) -> tuple[Launch, Launch]:
    """Forward and dz of a head with E = 4096 and K targets per token, for the doctor."""
    config = _config(4096, K, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], "HAS_CAP" in flags, target)
    config |= {flag: flag in flags for flag in ("EXPECTED", "TOTAL", "EXCLUDE", "HAS_CAP")}
    types = dict.fromkeys(("p_hidden", "p_weight", "p_dz"), f"*{dtype}") | {"p_targets": "*i64"}
    name = " ".join((dtype, *flags)).lower() + f" K={K}" * (K > 1)
    return launch_of(_head_forward, f"forward {name}", config, types), launch_of(_head_dz, f"dz {name}", config, types)
