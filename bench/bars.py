"""What is expected of a GPU (an H200, say), and which of it a run of bench/gpu.sh found."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
MEBI = 1 << 20
PEERS = {"Liger": "Liger", "flash": "SDPA flash", "deterministic": "SDPA flash, deterministic", "eager": "torch eager"}


@dataclass(frozen=True)
class Bar:
    """`of(rows)` gives the numbers that count, none if they are missing; the worst must be at least, or at most, so."""

    what: str
    of: Callable[[list[Row]], Iterator[float | None]]
    least: float | None = None
    most: float | None = None

    def cells(self, rows: list[Row]) -> tuple[str, str, str, str]:
        """What, wanted, measured, and whether that meets it."""
        wanted = f"≥ {self.least:g}" if self.most is None else f"≤ {self.most:g}"
        found = [value for value in self.of(rows) if value is not None]
        if not found:
            return self.what, wanted, "–", "not measured"
        worst = min(found) if self.most is None else max(found)
        met = worst >= self.least if self.most is None else worst <= self.most
        return (
            self.what,
            wanted,
            f"{worst:.3g}" + f", the worst of {len(found)}" * (len(found) > 1),
            "yes" * met or "NO",
        )


def chosen(rows: list[Row], **wanted: Any) -> Iterator[Row]:
    """The rows of no search that went well and have these values; of a dict, as `shape`, these of its items."""

    def fits(value: Any, wish: Any) -> bool:
        return value is not None and wish.items() <= value.items() if isinstance(wish, dict) else value == wish

    counted = (row for row in rows if row.get("status") == "ok" and "searched" not in row)
    return (row for row in counted if all(fits(row.get(key), wish) for key, wish in wanted.items()))


def of(key: str, **wanted: Any) -> Callable[[list[Row]], Iterator[float | None]]:
    """A number of our rows."""
    return lambda rows: (row.get(key) for row in chosen(rows, **{"provider": "tritium"} | wanted))


def against(peer: str, **wanted: Any) -> Callable[[list[Row]], Iterator[float | None]]:
    """The peer's time over ours, on each shape, dtype and pass that both have."""

    def ratios(rows: list[Row]) -> Iterator[float]:
        def key(row: Row) -> tuple:
            return row["op"], str(row["shape"]), row["dtype"], row["pass"]

        ops = [row for row in rows if "checked_shape" in row]
        theirs = {key(row): row["ms"] for row in chosen(ops, provider=PEERS[peer], **wanted)}
        for row in chosen(ops, provider="tritium", **wanted):
            if theirs.get(key(row)) and not row["reason"]:  # such as gradients that were made forward
                yield theirs[key(row)] / row["ms"]

    return ratios


def of_copy(rows: list[Row]) -> Iterator[float]:
    """The share of the copy's bandwidth of what memory bounds, where it moves 64 Mi elements at least."""
    for row in chosen(rows, provider="tritium", bound="memory"):
        size = 4 if row["dtype"] == "float32" else 2
        if "checked_shape" in row and row["gbps"] * row["ms"] * 1e6 >= 64 * MEBI * size:
            yield row["of_ceiling"]


def packed(rows: list[Row]) -> Iterator[float]:
    """Tokens/s of packed conversations over those of pretraining, of the same model in the same run."""
    for sft in chosen(rows, contender="tritium", stage="sft"):
        same = {key: sft[key] for key in ("shape", "bin_tokens", "micro_tokens")}
        for pretrain in [*chosen(rows, contender="tritium", stage="pretrain", text=False, **same)][:1]:
            yield sft["tokens_per_second"] / pretrain["tokens_per_second"]


def apart(rows: list[Row]) -> Iterator[float]:
    """The mean relative difference of the loss to transformers' with fp32 weights, over the steps on real text."""
    for ours in chosen(rows, contender="tritium", text=True):
        for theirs in chosen(rows, contender="hf_autocast", text=True, shape=ours["shape"]):
            pairs = list(zip(ours["losses"], theirs["losses"], strict=False))  # ours is told a step later
            yield sum(abs(a - b) / b for a, b in pairs) / max(1, len(pairs))


LONG, LARGE = {"T": 16384, "N": 16384}, {"V": 151936}
ATTENTION = {"op": "attention", "dtype": "bfloat16", "shape": LONG}
HEAD = {"op": "linear_cross_entropy", "dtype": "bfloat16", "shape": LARGE, "pass": "both"}
FULL = {"op": "train step", "preset": "1b", "finetune": "full", "context": 4096}
BARS = (
    Bar("memory-bound ops, of the copy's bandwidth", of_copy, least=0.9),
    Bar("attention forward, 16k: SDPA flash's time / ours", against("flash", **ATTENTION, **{"pass": "forward"}), 1.0),
    Bar("attention forward, 16k: TFLOP/s", of("tflops", **ATTENTION, **{"pass": "forward"}), least=400),
    Bar("attention backward, 16k: SDPA flash's / ours", against("flash", **ATTENTION, **{"pass": "backward"}), 0.7),
    Bar("… deterministic, as ours", against("deterministic", **ATTENTION, **{"pass": "backward"}), least=0.95),
    Bar("linear_cross_entropy, V 151,936: ours / its three matmuls", of("of_bare", **HEAD), most=1.4),
    Bar("… bytes above its inputs / GiB", lambda rows: (b / 2**30 for b in of("memory_bytes", **HEAD)(rows)), most=6),
    Bar("linear_logprob, V 151,936: ours / its four", of("of_bare", **HEAD | {"op": "linear_logprob"}), most=1.3),
    Bar("lora_linear: two products' time / ours", against("eager", op="lora_linear", dtype="bfloat16"), least=0.952),
    Bar("wherever Liger has the op: its time / ours", against("Liger"), least=1.0),
    Bar("1B, 4096: MFU", of("mfu", **FULL, recompute="none"), least=0.45),
    Bar("1B, 4096, all activations made again: MFU", of("mfu", **FULL, recompute="full"), least=0.45),
    Bar("packed SFT's tokens/s / pretraining's", packed, least=0.97),
    Bar("loss on real text: mean difference to transformers'", apart, most=0.01),
    Bar("decoding at batch 1: of reading the weights", of("of_ceiling", op="decode step", shape={"B": 1}), least=0.6),
)


def table_of_bars(rows: list[Row]) -> list[str]:
    lines = ["", "| bar | wanted | measured | met |", "|---|---|---|---|"]
    return lines + [f"| {' | '.join(bar.cells(rows))} |" for bar in BARS]
