"""The search finds the minimum of a known function, and better than chance does."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tritium.core.config import ConfigError
from tritium.core.search import GaussianProcess, Setting, matern, suggest

SPACE = [Setting.parse(t) for t in ("lr=1e-5:1e-1:log", "warmup=0:1", "layers=2:12", "kind=a,b,c")]
SPACE[2] = replace(SPACE[2], whole=True)


def loss(s: dict) -> float:
    """Smallest, 1.0, at lr = 3e-3, warmup = 0.3, layers = 9, kind = b."""
    bowl = (math.log10(s["lr"] / 3e-3) / 2) ** 2 + (s["warmup"] - 0.3) ** 2 + ((s["layers"] - 9) / 10) ** 2
    return 1.0 + bowl + {"a": 0.2, "b": 0.0, "c": 0.5}[s["kind"]]


def search(trials: int, seed: int, learn: bool) -> tuple[float, dict]:
    rng, tried, values = np.random.default_rng(seed), [], []
    for _ in range(trials):
        tried.append(suggest(SPACE, tried, values if learn else [], rng))
        values.append(loss(tried[-1]))
    return min(values), tried[int(np.argmin(values))]


def test_the_gaussian_process_finds_the_minimum_and_beats_chance():
    found = [search(24, seed, True) for seed in range(2)]
    assert all(value < 1.03 and best["kind"] == "b" for value, best in found), found
    assert np.mean([v for v, _ in found]) < np.mean([search(24, seed, False)[0] for seed in range(2)]) - 0.02
    assert search(14, 5, True) == search(14, 5, True)


def test_the_process_goes_through_what_it_saw_and_doubts_what_it_did_not():
    rng = np.random.default_rng(0)
    x = rng.random((25, 2))
    process = GaussianProcess(x, np.sin(6 * x[:, 0]) * 3 + 100)  # the second coordinate says nothing
    mean, deviation = process.predict(x)
    np.testing.assert_allclose(mean, np.sin(6 * x[:, 0]) * 3 + 100, atol=0.05)
    grid = rng.random((200, 2))
    assert np.abs(process.predict(grid)[0] - np.sin(6 * grid[:, 0]) * 3 - 100).mean() < 0.1
    assert process.lengths[1] > process.lengths[0]
    assert process.predict(np.array([[5.0, 5.0]]))[1] > 10 * deviation.max()
    # Expected improvement is the mean of max(best − f, 0): against 200,000 draws.
    point, best = np.array([[0.5, 0.5]]), 100.0
    (m,), (d,) = process.predict(point)
    drawn = np.maximum(best - rng.normal(m, d, 200_000), 0).mean()
    assert process.expected_improvement(point, best)[0] == pytest.approx(drawn, rel=0.05, abs=1e-6)


def test_equal_values_and_repeated_points_do_no_harm():
    x = np.zeros((6, 1))
    mean, deviation = GaussianProcess(x, np.ones(6)).predict(np.array([[0.0], [1.0]]))
    assert np.isfinite([*mean, *deviation]).all() and mean[0] == pytest.approx(1.0)
    assert matern(x, x, np.ones(1)) == pytest.approx(1.0)


def test_settings_stay_in_their_ranges_and_whole_ones_are_whole():
    rng = np.random.default_rng(0)
    drawn = [{s.name: s.draw(rng) for s in SPACE} for _ in range(500)]
    assert all(1e-5 <= d["lr"] <= 1e-1 and isinstance(d["layers"], int) and 2 <= d["layers"] <= 12 for d in drawn)
    assert 0.4 < np.mean([d["lr"] < 1e-3 for d in drawn]) < 0.6  # half of the range of a logarithm
    assert {d["kind"] for d in drawn} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr", "write NAME=LOW:HIGH"),
        ("lr=1", "give two values or more"),
        ("lr=1:0", "LOW must be below HIGH"),
        ("lr=0:1:log", "above 0 for log"),
        ("lr=a:b", "a:b are not numbers"),
        ("lr=1:2:exp", "may be :log"),
        ("lr=0:inf", "LOW must be below HIGH"),
    ],
)
def test_a_range_that_is_none_is_a_sentence(text, words):
    with pytest.raises(ConfigError, match=words):
        Setting.parse(text)
