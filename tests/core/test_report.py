"""The report: well-formed, self-contained, nothing in it but what was escaped, and charts that show their data."""

import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from tritium.core.config import UserError
from tritium.core.report import read_curves, svg_chart, write_report

SVG = "{http://www.w3.org/2000/svg}"
EVIL = '<script>alert("x")</script> & \' " \x00\x1b\ud800 😀'


def points(path: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path) if pair]


def curves(svg: str) -> list[list[tuple[float, float]]]:
    """The pixels of each drawn line, legend and raw data left out."""
    paths = [path for path in ET.fromstring(svg).iter(f"{SVG}path") if path.get("class") != "raw"]
    return [points(path.get("d")) for path in paths if "h16" not in path.get("d")]


def curves_raw(series: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The pixels of a single series as it is, before smoothing."""
    root = ET.fromstring(svg_chart({"loss": series}, "t", "x", "y"))
    return next(points(path.get("d")) for path in root.iter(f"{SVG}path") if path.get("class") == "raw")


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(
        path,
        title=EVIL,
        config_toml=f"name = {EVIL}",
        stages=[
            {"name": "pretrain", "metric": "loss", "before": 8.314, "after": 1.25, "seconds": 312.4}
            | {"tokens_per_second": 52345.6, "checkpoint": EVIL},
            {"name": "sft"},
        ],
        curves={EVIL: {EVIL: [(i, math.exp(-i)) for i in range(60)], "two": [(0, 1.0)]}, "empty": {"x": []}},
        samples=[{"prompt": EVIL, "before": EVIL, "after": "a\n\tb"}],
        machine={"cpu": EVIL, "cores": 2},
    )
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_nothing_in_it_is_live(page):
    root = ET.fromstring(page)
    names = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert not names & {"script", "link", "img", "iframe", "image", "use", "object"}
    assert page.count("&lt;script&gt;") >= 8 and "<script" not in page


def test_the_page_needs_nothing_from_outside(page):
    assert set(re.findall(r"https?://[^\"' <]*", page)) <= {"http://www.w3.org/2000/svg"}
    assert "url(" not in page and "@import" not in page and " src=" not in page and " href=" not in page
    assert "default-src 'none'" in page


def test_the_page_follows_the_readers_colours_and_width(page):
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_the_stage_table_shows_numbers_and_gaps(page):
    rows = [[cell.text for cell in row] for row in ET.fromstring(page).iter("tr")]
    assert rows[0] == ["stage", "metric", "before", "after", "seconds", "tokens/s", "checkpoint"]
    assert rows[1][:6] == ["pretrain", "loss", "8.314", "1.25", "312.4", "52,346"]
    assert rows[2] == ["sft", "–", "–", "–", "–", "–", "–"]


def test_a_chart_places_its_points():
    ((first, middle, last),) = curves(svg_chart({"loss": [(0, 0), (5, 5), (10, 10)]}, "t", "x", "y"))
    assert first[0] < middle[0] < last[0] and first[1] > middle[1] > last[1]  # y grows downwards
    assert middle == ((first[0] + last[0]) / 2, (first[1] + last[1]) / 2)


def test_a_chart_says_in_words_what_it_shows():
    root = ET.fromstring(svg_chart({"train": [(0, 4.0), (9, 1.5)]}, "Loss", "step", "nats"))
    assert root.get("role") == "img" and root.get("aria-label") == "Loss: train from 4 to 1.5"
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"Loss", "step", "nats", "0", "8"} <= set(texts)


def test_several_series_have_a_legend_and_colours_of_their_own():
    svg = svg_chart({"train": [(0, 1), (1, 2)], "validation": [(0, 2), (1, 3)]}, "t", "x", "y")
    root = ET.fromstring(svg)
    assert {"train", "validation"} <= {text.text for text in root.iter(f"{SVG}text")}
    assert len({path.get("stroke") for path in root.iter(f"{SVG}path")}) == 2


def test_a_long_series_is_thinned():
    svg = svg_chart({"loss": [(i, i % 7) for i in range(100_000)]}, "t", "x", "y")
    assert len(svg) < 20_000 and all(64 <= x <= 624 for x, _ in curves(svg)[0])


def test_smoothing_removes_noise_and_does_not_lag():
    # A line, and the same line with noise that is over in a few pixels: the smoothed one is the line, to its very end.
    noisy = [(i, i + 300 * (-1) ** i) for i in range(250)]
    ((*smoothed,),) = curves(svg_chart({"loss": noisy}, "t", "x", "y"))
    raw_spread = max(abs(b[1] - a[1]) for a, b in zip(curves_raw(noisy), curves_raw(noisy)[1:], strict=False))
    steps = [b[1] - a[1] for a, b in zip(smoothed[10:-10], smoothed[11:-10], strict=False)]
    assert max(map(abs, steps)) < raw_spread / 4
    ((*straight,),) = curves(svg_chart({"loss": [(i, i) for i in range(250)]}, "t", "x", "y"))
    slope = (straight[-1][1] - straight[0][1]) / (straight[-1][0] - straight[0][0])
    assert all(abs(y - straight[0][1] - slope * (x - straight[0][0])) < 0.2 for x, y in straight)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-12, 1e300, -1e-300])
def test_a_constant_series_can_be_drawn(value):
    ((first, last),) = curves(svg_chart({"x": [(0, value), (1, value)]}, "t", "x", "y"))
    assert first[1] == last[1] and 64 <= first[1] <= 312


def test_values_that_are_not_finite_are_left_out():
    ((*drawn,),) = curves(svg_chart({"x": [(0, 1), (1, math.nan), (2, math.inf), (3, 2)]}, "t", "x", "y"))
    assert len(drawn) == 2
    assert "nothing was logged" in svg_chart({"x": [(0, math.nan)]}, "t", "x", "y")


def test_read_curves_takes_the_steps_that_logged_a_key(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 3.0, "lr": 0.1}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": 1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "los')
    read = read_curves(path, ["loss", "lr", "reward"])
    assert read["lr"] == [(1, 0.1)] and read["reward"] == []
    assert [step for step, _ in read["loss"]] == [1, 2, 3] and math.isnan(read["loss"][1][1])
    with pytest.raises(UserError, match="cannot read the metrics"):
        read_curves(tmp_path / "none.jsonl", ["loss"])
