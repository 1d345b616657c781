"""Warnings about the health of a reinforcement-learning run, from its metrics.

`diagnose` reads the history of a run (its metrics.jsonl, one mapping per step) and returns sentences. It compares the
mean of the first quarter with that of the last, or looks only at the last. The metrics are those of core/experience.py
and core/objectives/policy.py; one that was not logged gives no warning.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import NamedTuple

BLOWN_UP = 0.5  # KL in nats per token above which the policy has left the reference behind

IDLE = (
    "{idle:.0f} of {steps:.0f} steps had nothing to learn from: no answers differed in score, or none was judged (see "
    "varied_groups, pairs_kept, verifier_failures in metrics.jsonl). Use problems that are neither too easy nor too "
    "hard, a higher sampling.temperature, or more answers per problem"
)  # printed at the end of a run

PANEL = {  # chart of the report → its series
    "reward": ("reward", "shaped_reward", "right"), "KL": ("kl_k1", "kl_k3", "old_kl", "beta"),
    "ratio": ("ratio", "clip_fraction", "value_clip_fraction"), "entropy": ("entropy",), "length": ("length",),
    "log-prob gap of sampler and trainer": ("sampler_gap",), "answers": ("ended", "varied_groups"),
    "critic": ("explained_variance", "value_loss"), "failures": ("verifier_failures", "kl_blowups"),
    "tokens per second": ("sampled_tokens_per_second", "tokens_per_second"),
}  # fmt: skip


class Trend(NamedTuple):
    """A metric at the start and at the end of a run, and how much it varies within them from step to step."""

    before: float
    after: float
    noise: float

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def rises(self) -> bool:
        return self.change > max(2 * self.noise, 1e-9)

    @property
    def falls(self) -> bool:
        return -self.change > max(2 * self.noise, 1e-9)


def trend(history: Sequence[Mapping[str, float]], name: str) -> Trend | None:
    """None where fewer than eight steps logged the metric. `noise` is the standard error of the change."""
    values = [row[name] for row in history if name in row and math.isfinite(row[name])]
    if len(values) < 8:
        return None
    quarter = len(values) // 4
    first, last = values[:quarter], values[-quarter:]
    return Trend(fmean(first), fmean(last), math.hypot(pstdev(first), pstdev(last)) / math.sqrt(quarter))


def reward_hacking(of: Callable[[str], Trend | None], history: Sequence[Mapping[str, float]]) -> str | None:
    reward, right, length = of("reward"), of("right"), of("length")
    if not reward or not right or not reward.rises or right.rises:
        return None
    verified = "verified accuracy falls" if right.falls else "verified accuracy does not"
    grows = [n for n in components(history) if (t := of(n)) and t.rises]
    paid = f"; what grows is {', '.join(n.removeprefix('reward/') for n in grows)}" if grows else ""
    longer = f"; answers became {length.after / length.before:.1f} × as long" if length and length.rises else ""
    return (
        f"reward rises ({reward.before:.3g} → {reward.after:.3g}) while {verified} ({right.before:.3g} → "
        f"{right.after:.3g}): likely reward hacking{paid}{longer}"
    )


def components(history: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for row in history for name in row if name.startswith("reward/")))


def failures(history: Sequence[Mapping[str, float]]) -> str | None:
    failed = sum(row.get("verifier_failures", 0.0) for row in history)
    return f"the judge failed {failed:.0f} times: these answers were not trained on" if failed else None


# kind → (metric, whether its trend is a problem, the warning)
TROUBLES: dict[str, tuple[str, Callable[[Trend], bool], str]] = {
    "KL": (
        "kl_k3",
        lambda t: t.after > max(BLOWN_UP, 5 * t.before),
        "the KL to the reference blew up ({t.before:.3g} → {t.after:.3g} per token): raise beta, or lower optim.lr",
    ),
    "entropy": (
        "entropy",
        lambda t: t.falls and t.after < 0.2 * t.before,
        "entropy collapsed ({t.before:.3g} → {t.after:.3g}): answers hardly vary; raise clip_high, or lower optim.lr",
    ),
    "sampler": (
        "sampler_gap",
        lambda t: t.after > 0.1,
        "sampler and trainer differ by {t.after:.2g} in the log-prob of a token: set importance to correct for it",
    ),
    "clipping": (
        "clip_fraction",
        lambda t: t.after > 0.3,
        "{t.after:.0%} of the tokens are clipped: make fewer updates per rollout, or lower optim.lr",
    ),
    "endings": (
        "ended",
        lambda t: t.falls and t.after < 0.7,
        "only {t.after:.0%} of the answers end by themselves ({t.before:.0%} at first): raise sampling.max_tokens or "
        "shaping.missing_eos",
    ),
    "groups": (
        "varied_groups",
        lambda t: t.after < 0.1,
        "scores differ in only {t.after:.0%} of the groups: the problems are too easy or too hard; see data.band",
    ),
    "critic": (
        "explained_variance",
        lambda t: t.after < -0.1,
        "the critic is worse than a constant (explained variance {t.after:.2g}): set ppo.value_warmup",
    ),
}


def diagnose(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """{kind: warning} about a run, from its metrics so far; empty where all is well, or too little is known."""
    of = lambda name: trend(history, name)  # noqa: E731
    found = {"hacking": reward_hacking(of, history)}
    for kind, (name, troubled, sentence) in TROUBLES.items():
        seen = of(name)
        found[kind] = sentence.format(t=seen) if seen and troubled(seen) else None
    found["failures"] = failures(history)
    return {kind: sentence for kind, sentence in found.items() if sentence}
