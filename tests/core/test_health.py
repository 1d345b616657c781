"""What the panel says of histories whose trouble is known."""

import random
import re

import pytest

from tritium.core.health import diagnose


def history(steps: int = 40, seed: int = 0, noise: float = 0.02, **ends) -> list[dict]:
    """Metrics that go from one value to another, noisily."""
    rng, rows = random.Random(seed), []
    for i in range(steps):
        at = i / (steps - 1)
        rows.append({k.replace("__", "/"): a + (b - a) * at + rng.gauss(0, noise) for k, (a, b) in ends.items()})
    return rows


HEALTHY = {"reward": (0.2, 0.7), "right": (0.2, 0.7), "entropy": (1.0, 0.5), "length": (40, 45), "kl_k3": (0.0, 0.1),
           "ended": (0.9, 0.97), "varied_groups": (0.6, 0.4), "clip_fraction": (0.02, 0.05),
           "explained_variance": (0.0, 0.6), "sampler_gap": (0.01, 0.01)}  # fmt: skip


def test_a_healthy_run_is_not_warned_about():
    assert diagnose(history(**HEALTHY)) == {} and diagnose([]) == {}
    assert diagnose(history(6, reward=(0, 9), right=(1, 0))) == {}  # too little is known


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ({"right": (0.5, 0.3)}, "reward rises .* while verified accuracy falls .*: likely reward hacking"),
        ({"right": (0.3, 0.3), "reward__length": (0.1, 0.9)}, "accuracy does not .*; what grows is length"),
        ({"kl_k3": (0.05, 2.0)}, "KL to the reference blew up"),
        ({"entropy": (1.0, 0.05)}, "entropy collapsed"),
        ({"sampler_gap": (0.0, 0.4)}, "sampler and trainer differ"),
        ({"clip_fraction": (0.05, 0.6)}, "of the tokens are clipped"),
        ({"ended": (0.95, 0.3)}, "only .* of the answers end"),
        ({"varied_groups": (0.5, 0.0)}, "differ in only .* of the groups"),
        ({"explained_variance": (0.0, -0.6)}, "critic is worse than a constant"),
    ],
)
def test_a_trouble_is_named(trouble, words):
    found = list(diagnose(history(**HEALTHY | trouble)).values())
    assert len(found) == 1 and re.search(words, found[0]), found


@pytest.mark.parametrize(
    "near",
    [
        {"reward": (0.2, 0.2), "right": (0.5, 0.3)},  # accuracy falls, but no reward rises
        {"kl_k3": (0.6, 0.9)},  # far from the reference from the start: another phase's policy
        {"entropy": (1.0, 0.3)},
        {"sampler_gap": (0.0, 0.08)},
        {"clip_fraction": (0.05, 0.25)},
        {"ended": (0.95, 0.75)},
        {"ended": (0.3, 0.3)},  # low, but it does not fall
        {"varied_groups": (0.5, 0.2)},
        {"explained_variance": (0.0, -0.05)},
        {"verifier_failures": (0.0, 0.0)},
    ],
)
def test_what_is_near_a_trouble_is_not_named(near):
    assert diagnose(history(noise=0.0, **HEALTHY | near)) == {}


def test_failures_of_the_judge_are_counted():
    rows = [{"verifier_failures": 0.0}] * 3 + [{"verifier_failures": 2.0}] * 2
    assert list(diagnose(rows).values()) == ["the judge failed 4 times: these answers were not trained on"]


def test_noise_alone_is_no_reward_hacking():
    named = sum(bool(diagnose(history(24, seed, 0.1, reward=(0.5, 0.5), right=(0.5, 0.5)))) for seed in range(50))
    assert named <= 3
