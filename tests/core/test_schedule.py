"""The learning rate's shapes: where they begin and end, and that they only fall after the warm-up."""

import json
import math

import pytest

from tritium.core.config import ConfigError
from tritium.core.schedule import BatchRamp, ScheduleConfig, learning_rate

TOTAL = 100
DECAYS = ("linear", "1-sqrt", "exponential")
SHAPES = [ScheduleConfig(kind=kind, warmup=0.1, floor=0.2) for kind in ("constant", "linear", "cosine")]
SHAPES += [ScheduleConfig(kind="wsd", warmup=0.1, floor=0.2, decay=0.3, decay_shape=shape) for shape in DECAYS]


def rates(config: ScheduleConfig, total: int = TOTAL) -> list[float]:
    return [learning_rate(config, 2.0, step, total) for step in range(total)]


@pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"{c.kind}-{c.decay_shape}")
def test_it_rises_linearly_to_the_peak_and_then_never_rises(config):
    values = rates(config)
    assert values[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert values[10] == 2.0 == max(values)
    assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False))


@pytest.mark.parametrize("config", SHAPES[1:], ids=lambda c: f"{c.kind}-{c.decay_shape}")
def test_it_ends_at_the_floor(config):
    exponential = 0.8 * 2.0**-10 if config.decay_shape == "exponential" else 0.0  # ten halvings, not zero
    assert learning_rate(config, 2.0, TOTAL, TOTAL) == pytest.approx(2.0 * (0.2 + exponential))
    assert learning_rate(config, 2.0, 10 * TOTAL, TOTAL) == learning_rate(config, 2.0, TOTAL, TOTAL)
    assert rates(config)[-1] > 0.4  # the last step still learns


def test_the_middle_of_each_shape():
    linear, cosine, root, halves = SHAPES[1], SHAPES[2], SHAPES[4], SHAPES[5]
    assert learning_rate(linear, 1.0, 55, TOTAL) == pytest.approx(0.2 + 0.8 / 2)
    assert learning_rate(cosine, 1.0, 10 + 30, TOTAL) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert learning_rate(root, 1.0, 85, TOTAL) == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(0.5)))
    assert learning_rate(halves, 1.0, 73, TOTAL) == pytest.approx(0.2 + 0.8 / 2)


def test_wsd_is_flat_until_its_decay_starts():
    values = rates(SHAPES[3])
    assert values[10:71] == [2.0] * 61 and values[71] < 2.0


def test_a_wsd_decay_longer_than_the_run_starts_after_the_warmup():
    values = rates(ScheduleConfig(kind="wsd", warmup=0.1, decay=1000, decay_shape="linear"))
    assert values[10] == 2.0 and values[11] < 2.0


def test_lengths_are_steps_from_1_on_and_shares_below():
    assert rates(ScheduleConfig(warmup=20)) == rates(ScheduleConfig(warmup=0.2))
    assert rates(ScheduleConfig(warmup=0))[0] == 2.0


def test_a_run_of_one_step():
    assert all(math.isfinite(rates(config, total=1)[0]) for config in SHAPES)


def test_a_negative_length_is_an_error():
    with pytest.raises(ConfigError, match="schedule.warmup=-1"):
        ScheduleConfig(warmup=-1)


# ---------------------------------------------------------------------------------------------- the batch


def spans(ramp: BatchRamp, steps: int) -> list[tuple[int, int]]:
    return [ramp.span(step) for step in range(steps)]


def assert_no_bin_is_passed_over(found: list[tuple[int, int]]) -> None:
    ends = [first + count for first, count in found]
    assert [first for first, _ in found] == [0, *ends[:-1]]


@pytest.mark.parametrize("length", [20, 0.2])
def test_the_batch_grows_linearly_and_then_stays(length):
    found = spans(BatchRamp(ScheduleConfig(batch_start=0.25, batch_ramp=length), 16, 2, TOTAL, {}), TOTAL)
    assert_no_bin_is_passed_over(found)
    assert [count for _, count in found[:21]] == [round(4 + 12 * step / 20) for step in range(21)]
    assert {count for _, count in found[20:]} == {16}


def test_a_longer_run_goes_on_with_the_next_bin():
    config, notes = ScheduleConfig(batch_start=0.25, batch_ramp=0.2), {}
    found = spans(BatchRamp(config, 16, 2, TOTAL, notes), TOTAL)
    assert spans(BatchRamp(config, 16, 2, 2 * TOTAL, json.loads(json.dumps(notes))), TOTAL) == found


def test_it_never_has_fewer_bins_than_there_are_ranks():
    assert BatchRamp(ScheduleConfig(batch_start=0.01, batch_ramp=10), 16, 4, TOTAL, {}).span(0) == (0, 4)


def test_it_doubles_when_the_loss_stalls_and_a_resumed_run_does_so_at_the_same_step():
    config, losses = ScheduleConfig(batch_start=0.25, batch_patience=3), [5, 4, 3, 2, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    losses += [0] * 15
    for stop in range(1, 30):  # a checkpoint before this step, for which all losses are read
        notes, found = {}, []
        ramp = BatchRamp(config, 16, 1, TOTAL, notes)
        for step in range(30):
            if step == stop:
                ramp.observe(step - 1, losses[step - 1])
                ramp = BatchRamp(config, 16, 1, TOTAL, json.loads(json.dumps(notes)))
            found.append(ramp.span(step))
            if 0 < step != stop:
                ramp.observe(step - 1, losses[step - 1])
        counts = [count for _, count in found]
        assert_no_bin_is_passed_over(found)
        # at 11, of 4 to 9, the newest that are known: 1 is not below 1; from 11 on: 0 in all
        assert counts == [4] * 11 + [8] * 7 + [16] * 12, stop


@pytest.mark.parametrize("options", [{"batch_start": 0.5}, {"batch_ramp": 3}, {"batch_start": 0.0, "batch_ramp": 3},
                                     {"batch_start": 0.5, "batch_ramp": 3, "batch_patience": 3}])  # fmt: skip
def test_a_batch_that_grows_in_no_way_or_in_two_is_an_error(options):
    with pytest.raises(ConfigError, match="schedule.batch_start"):
        ScheduleConfig(**options)
