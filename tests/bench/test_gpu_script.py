"""bench/gpu.sh, rehearsed on a CPU: a slice ends in time, and the next one goes on where it stopped."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import tritium
from tritium.bench.__main__ import main

ROOT = pathlib.Path(tritium.__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a script of bash and GNU's tools")


@pytest.fixture
def run(tmp_path):
    """(exit code, what was printed, the rows of steps.jsonl) of a slice of so many seconds."""

    def slice_of(seconds, only, **environment):
        environment = os.environ | {"DEVICE": "cpu", "ONLY": only, "PYTHON": sys.executable} | environment
        command = ["bash", str(ROOT / "bench" / "gpu.sh"), str(tmp_path / "out"), str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        steps = (tmp_path / "out" / "steps.jsonl").read_text().splitlines()
        return done.returncode, done.stdout, [json.loads(line) for line in steps]

    return slice_of


@pytest.fixture
def python(tmp_path):
    """A python3 that ends a step at once, as timeout does what it cuts off where `cut` is in its command, else well."""

    def cutting(cut, code=124):
        fake = tmp_path / "python"
        cases = f'*summary*) exec {sys.executable} "$@" ;; {cut}) exit {code} ;;'
        fake.write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\n')
        fake.chmod(0o755)
        return str(fake)

    return cutting


def test_a_slice_runs_measures_and_sums_up(run, tmp_path, capsys):
    only = "^(machine|kernels-gae)$"
    code, shown, steps = run(120, only)
    assert code == 0 and [step["step"] for step in steps] == ["machine", "kernels-gae"]
    assert all(step["status"] == "ok" for step in steps), shown
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert rows[0]["op"] == "machine" and "torch" in rows[0]["doctor"]["versions"]
    assert {row["op"] for row in rows[1:]} == {"gae"} and all(row["status"] == "ok" for row in rows[1:])
    assert "| machine | ok |" in shown and "| gae | T=4096 S=16 | bfloat16 | forward |" in shown
    assert "--device=cpu --dtypes=bfloat16 --quick --ops=gae" in (tmp_path / "out" / "log.txt").read_text()
    code, shown, again = run(120, only)
    assert code == 0 and again == steps and (tmp_path / "out" / "summary.md").read_text() in shown
    assert main(["summary", f"--folder={tmp_path / 'out'}", f"--charts={tmp_path / 'charts'}"]) == 0
    assert (tmp_path / "charts" / "gae.svg").exists() and "of ceiling" in capsys.readouterr().out


def test_what_the_end_of_a_slice_cuts_off_comes_first_in_the_next(run, python):
    only = "^(machine|test-geglu)$"
    code, shown, steps = run(120, only, PYTHON=python("*geglu*"))
    assert code == 75 and [step["step"] for step in steps] == ["machine"] and "test-geglu is next" in shown
    code, _, steps = run(120, only, PYTHON=python("never"))
    assert code == 0 and [(step["step"], step["status"]) for step in steps[1:]] == [("test-geglu", "ok")]


def test_what_a_whole_slice_is_too_short_for_is_given_up_and_the_rest_is_done(run, python):
    code, shown, steps = run(120, "^test-(gae|geglu)$", PYTHON=python("*gae-torch*"))
    assert [(step["step"], step["status"]) for step in steps] == [("test-gae", "too long"), ("test-geglu", "ok")]
    assert code == 1 and "| test-gae | too long |" in shown


def test_what_runs_beside_a_test_that_is_cut_off_is_recorded(run, python):
    code, shown, steps = run(120, "^(machine|test-(gae|geglu|rope))$", PYTHON=python("*geglu*"))
    assert code == 75 and [step["step"] for step in steps] == ["machine", "test-gae", "test-rope"]


def test_a_failure_is_told_and_does_not_stop_the_others(run, python):
    code, _, steps = run(120, "^test-(geglu|rope)$", PYTHON=python("*geglu*", code=3))
    assert code == 1 and [step["status"] for step in steps] == ["failed (3)", "ok"]


def test_without_a_gpu_it_says_so(run, python):
    code, _, steps = run(120, ".", PYTHON=python("*cuda*", code=1), DEVICE="cuda")
    assert code == 2 and not steps
