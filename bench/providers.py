"""Who else computes an op: torch in its several ways, and other libraries where they are installed.

A provider takes the arguments of the op's public function and returns what that returns, so that one check and one
clock serve all. What it can't do is an exception with the reason, which becomes its row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tritium.kernels.registry import OpSpec

OURS, EAGER, COMPILED, BARE = "tritium", "torch eager", "torch.compile", "bare matmuls"

# What providers share: cross-entropy without our label smoothing with z-loss, which others don't have.
OPTIONS: dict[str, dict[str, Any]] = {"linear_cross_entropy": {}, "cross_entropy": {}}
# What is differentiated where an op returns more: in training, lse and entropy are metrics.
RESULT: dict[str, Callable] = {"linear_logprob": attrgetter("logp")}
# References that are a Python loop over an extent: torch.compile would unroll it, and a long one takes minutes.
LOOPS = {"gae": "T", "decode_attention": "B", "segment_sum": "S"}
LONGEST_LOOP = 4096


@dataclass(frozen=True)
class Provider:
    """`make(args, kwargs)` gives the function that is called with them: what may be prepared once is prepared there.

    Raises: NotImplementedError with the reason, for what it can't do.
    """

    name: str
    make: Callable[[tuple, dict], Callable]
    ops: tuple[str, ...] = ()  # empty: all
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None  # what must be installed
    computes_the_op: bool = True  # False: a yardstick, whose result is another


def providers(spec: OpSpec, device: str) -> list[Provider]:
    """Those that exist for an op on a device of this machine, ours first."""

    def compiled(args, kwargs):
        if spec.name in LOOPS:
            raise NotImplementedError(f"it would unroll the reference's loop over {LOOPS[spec.name]}")
        torch.compiler.reset()
        return torch.compile(spec.reference, dynamic=False)  # else a second shape gets a slower, general kernel

    own = (
        Provider(OURS, lambda args, kwargs: spec.function),
        Provider(EAGER, lambda args, kwargs: spec.reference),
        Provider(COMPILED, compiled),
    )
    return [
        provider
        for provider in own + PEERS
        if (not provider.ops or spec.name in provider.ops)
        and device in provider.devices
        and (provider.package is None or find_spec(provider.package))
    ]


def _only(kwargs: dict[str, Any], *known: str) -> None:
    """Raises: NotImplementedError for an option of the call that a peer doesn't have."""
    other = [name for name, value in kwargs.items() if name not in known and value is not None]
    if other:
        raise NotImplementedError(f"it has no {', '.join(other)}")


# Attention ------------------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend) -> Callable:
    """Documents of one length as a batch, others one by one: what a user of SDPA can do with packed documents."""

    def make(args: tuple, kwargs: dict) -> Callable:
        _only(kwargs, "cu_seqlens", "causal", "scale")
        cu_seqlens = kwargs.get("cu_seqlens")
        ends = [0, len(args[0])] if cu_seqlens is None else cu_seqlens.tolist()
        lengths = [end - start for start, end in zip(ends, ends[1:], strict=False)]

        def one(q: Tensor, k: Tensor, v: Tensor, batch: int, causal: bool, scale: float | None) -> Tensor:
            heads_first = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # [batch, heads, N, D]
            with sdpa_kernel(backend):
                o = F.scaled_dot_product_attention(
                    *heads_first, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
                )
            return o.transpose(1, 2).flatten(0, 1)

        def sdpa(q, k, v, *, cu_seqlens=None, causal=True, scale=None, **_):
            if len(set(lengths)) == 1:
                return one(q, k, v, len(lengths), causal, scale)
            parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
            return torch.cat([one(*part, 1, causal, scale) for part in parts if len(part[0])])

        return sdpa

    return make


def _flash_deterministic(args: tuple, kwargs: dict) -> Callable:
    """SDPA's flash attention with a backward that gives the same bits again, as ours does."""
    flash = _sdpa(SDPBackend.FLASH_ATTENTION)(args, kwargs)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would take time

    def switch(on: bool) -> Callable[[Tensor], None]:
        return lambda gradient: torch.use_deterministic_algorithms(on)

    def attention(q, k, v, **options):
        q = q.view_as(q)
        o = flash(q, k, v, **options)
        if o.requires_grad:  # just before the backward of what lies between, and after it
            o.register_hook(switch(True))
            q.register_hook(switch(False))
        return o

    return attention


def _flash_attn(args: tuple, kwargs: dict) -> Callable:
    from flash_attn import flash_attn_varlen_func

    _only(kwargs, "cu_seqlens", "causal", "window", "softcap", "scale")
    cu_seqlens = kwargs.get("cu_seqlens")
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, len(args[0])], dtype=torch.int32, device=args[0].device)
    longest = int(cu_seqlens.diff().max())

    def flash(q, k, v, *, causal=True, window=None, softcap=None, scale=None, **_):
        left = -1 if window is None else window - 1
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=causal,
            window_size=(left, 0 if causal else left), softcap=softcap or 0.0,
        )  # fmt: skip

    return flash


# Heads ----------------------------------------------------------------------------------------------------------------


class _BareMatmuls(torch.autograd.Function):
    """A head's matmuls and nothing else: unchunked logits [T, V], made again backward where `again`."""

    @staticmethod
    def forward(ctx, hidden, weight, again):
        ctx.save_for_backward(hidden, weight)
        ctx.again = again
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx, dz):
        hidden, weight = ctx.saved_tensors
        if ctx.again:
            hidden @ weight.t()
        return dz @ weight, dz.t() @ hidden, None


def _bare(again: bool) -> Callable:
    return lambda args, kwargs: lambda hidden, weight, *_, **__: _BareMatmuls.apply(hidden, weight, again)


def _torch_head(args: tuple, kwargs: dict) -> Callable:
    _only(kwargs, "label_smoothing", "reduction")
    chunks = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # without them it makes the logits, as torch eager
    fixed = {"reduction": "sum"} | ({"options": chunks()} if chunks else {})
    return lambda *args, **kwargs: F.linear_cross_entropy(*args, **fixed | kwargs)


def _liger(name: str, *known: str, **fixed: Any) -> Callable:
    def make(args: tuple, kwargs: dict) -> Callable:
        from liger_kernel.transformers import functional

        _only(kwargs, *known)
        function = getattr(functional, f"liger_{name}")
        return lambda *args, **kwargs: function(*args, **fixed | kwargs)

    return make


def _liger_rope(args: tuple, kwargs: dict) -> Callable:
    from liger_kernel.transformers.functional import liger_rope

    cos, sin = (x.repeat(1, 2)[None] for x in args[2:])  # [1, T, D]

    def rope(q, k, *_):  # [T, heads, D] here, [1, heads, T, D] there
        q, k = liger_rope(*(x.transpose(0, 1)[None] for x in (q, k)), cos, sin)[:2]
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return rope


def _torch_rms_norm(args: tuple, kwargs: dict) -> Callable:
    _only(kwargs, "eps")
    return lambda x, weight, eps=1e-6: F.rms_norm(x, weight.shape, weight, eps)


def _torch_norm(args: tuple, kwargs: dict) -> Callable:
    return torch.nn.utils.get_total_norm


_LINEAR, _CUDA, _LIGER = ("linear_cross_entropy",), ("cuda",), "liger_kernel"
_NEWER = (Provider("F.linear_cross_entropy", _torch_head, _LINEAR),) if hasattr(F, "linear_cross_entropy") else ()
PEERS = (
    Provider("F.rms_norm", _torch_rms_norm, ("rms_norm",)),
    Provider("get_total_norm", _torch_norm, ("global_norm",)),
    *_NEWER,
    Provider(BARE, _bare(again=False), _LINEAR, computes_the_op=False),
    Provider(BARE, _bare(again=True), ("linear_logprob",), computes_the_op=False),
    Provider("SDPA flash", _sdpa(SDPBackend.FLASH_ATTENTION), ("attention",)),
    Provider("SDPA flash, deterministic", _flash_deterministic, ("attention",), _CUDA),
    Provider("SDPA cuDNN", _sdpa(SDPBackend.CUDNN_ATTENTION), ("attention",), _CUDA),
    Provider("flash-attn", _flash_attn, ("attention",), _CUDA, "flash_attn"),
    Provider("Liger", _liger("rms_norm", eps=1e-6), ("rms_norm",), _CUDA, _LIGER),
    Provider("Liger", _liger("swiglu"), ("swiglu",), _CUDA, _LIGER),
    Provider("Liger", _liger("geglu"), ("geglu",), _CUDA, _LIGER),
    Provider("Liger", _liger_rope, ("rope",), _CUDA, _LIGER),
    Provider("Liger", _liger("cross_entropy", reduction="sum"), ("cross_entropy",), _CUDA, _LIGER),
    Provider("Liger", _liger("fused_linear_cross_entropy", reduction="sum"), _LINEAR, _CUDA, _LIGER),
)
