"""The doctor's numbers: right where they are known, never worse than the committed ones, honest about this machine."""

import json
import pathlib
import re

import pytest
import torch

import tritium
from tritium.kernels import doctor
from tritium.kernels.registry import Launch
from tritium.stages import doctor as command
from tritium.stages.cli import run_stage

BASELINE = pathlib.Path(tritium.__file__).parent / "bench" / "results" / "doctor.json"
KEY = ("op", "kernel", "config", "target")

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows():
    """Every kernel on sm_90; seconds when nothing is cached, one otherwise."""
    return doctor.compile_kernels(["sm_90"])


def test_every_kernel_compiles_and_fits(rows):
    assert rows and doctor.problems(rows) == []


def test_nothing_got_worse_than_the_baseline(rows):
    baseline = json.loads(BASELINE.read_text())
    if baseline["machine"]["versions"]["triton"] != doctor.machine()["versions"]["triton"]:
        pytest.skip("the baseline is another Triton's")
    committed = {tuple(row[key] for key in KEY): row for row in baseline["kernels"]}
    update = "If that is meant: tritium doctor --json > bench/results/doctor.json"
    for row in rows:
        key = tuple(row[key] for key in KEY)
        assert key in committed, f"{key} is not in the baseline. {update}"
        for number in ("registers", "spill_bytes", "shared_bytes"):
            assert row[number] <= committed[key][number], f"{key}: {number} was {committed[key][number]}. {update}"


def test_the_committed_kernels_fit_every_target_and_do_not_spill():
    """The worst attention backward aside; what peers spill: Liger's geglu backward 96 bytes, fla's attention 12–124."""
    committed = json.loads(BASELINE.read_text())["kernels"]
    assert {row["target"] for row in committed} == set(doctor.TARGETS) and doctor.problems(committed) == []
    assert {row["op"] for row in committed} == set(doctor.all_ops())


MATMULS = ("_attention_forward", "_attention_dq", "_attention_dkv", "_head_forward", "_head_dz", "_lora_matmul")
MATMULS += ("_linear_kl_online", "_linear_kl_jsd", "_linear_kl_dz")


def test_what_matmuls_bound_uses_hoppers_warp_group_instructions(rows):
    few = ("T=16", "only delta")  # or none: no matmul to speak of
    bound = [row for row in rows if row["kernel"] in MATMULS and "bf16" in row["config"]]
    bound = [row for row in bound if not any(word in row["config"] for word in few)]
    assert {row["kernel"] for row in bound} == set(MATMULS)
    for row in bound:
        assert any(name.startswith("HGMMA") for name in row["instructions"]), row["config"]
        assert not any(name.startswith("HMMA") for name in row["instructions"]), row["config"]


def test_rms_norm_is_as_written_on_nvidia_and_amd_and_results_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))
    rows = doctor.compile_kernels(["sm_80", "gfx942"], ["rms_norm"])
    forward = {row["target"]: row for row in rows if row["config"] == "forward E=4096 bf16"}
    # 4096 elements on 8 warps are two 16-byte loads a thread, of x, residual and weight; each is read once.
    assert forward["sm_80"]["instructions"] == {"LDG.E.128": 6, "STG.E": 1, "STG.E.128": 4}
    assert forward["gfx942"]["instructions"]["global_load_dwordx4"] >= 2
    for row in rows:
        assert 16 <= row["registers"] <= 128 and row["spill_bytes"] == 0

    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) == len(rows)
    for file in files:  # a second run must read these
        file.write_text(json.dumps(json.loads(file.read_text()) | {"registers": 1}))
    again = doctor.compile_kernels(["sm_80", "gfx942"], ["rms_norm"])
    assert again == [row | {"registers": 1} for row in rows]


def test_problems_are_sentences():
    row = dict(zip(KEY, ("op", "kernel", "D=256", "sm_86"), strict=True))
    row |= {"shared_bytes": 99 * 1024, "spill_bytes": 0}
    assert doctor.problems([row]) == []
    (spilling,) = doctor.problems([row | {"spill_bytes": 8}])
    assert spilling == "op: kernel D=256 on sm_86 spills 8 bytes; 0 are allowed"
    assert doctor.problems([row | {"kernel": "_attention_dkv", "spill_bytes": 256}]) == []
    (large,) = doctor.problems([row | {"shared_bytes": 120_000}])
    assert re.match(r"op: kernel D=256 on sm_86 needs 120000 bytes of shared memory; a block there has 101376", large)
    (broken,) = doctor.problems([row | {"error": "CompilationError: at 3:4"}])
    assert broken.endswith("does not compile: CompilationError: at 3:4")


def test_a_kernel_that_does_not_compile_is_a_row_with_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))

    class broken:  # a kernel with an argument that its launch does not name
        cache_key, arg_names = "", ["p_x"]

    row = doctor._row("op", Launch(broken, "all", {}, {}), doctor.TARGETS["sm_90"])
    assert row == {"op": "op", "kernel": "broken", "config": "all", "target": "sm_90", "error": "KeyError: 'p_x'"}
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "setting, cuda, expected",
    [
        ("auto", False, "torch: tensors on the CPU"),
        ("auto", True, "triton: tensors on a GPU"),
        ("torch", True, "torch: TRITIUM_BACKEND=torch"),
        ("triton", False, "triton: TRITIUM_BACKEND=triton, in the interpreter"),
        ("cuda", True, "none: TRITIUM_BACKEND='cuda'"),
    ],
)
def test_backend_and_reason(monkeypatch, setting, cuda, expected):
    monkeypatch.setenv("TRITIUM_BACKEND", setting)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    backends = doctor.machine()["backends"]
    assert set(backends) == set(doctor.all_ops()) and all(why.startswith(expected) for why in backends.values())


def test_a_processor_that_names_no_model_is_called_by_its_architecture(monkeypatch):
    """As on Arm, where /proc/cpuinfo has no "model name"."""
    monkeypatch.setattr(doctor.pathlib.Path, "read_text", lambda self: "processor\t: 0\nFeatures\t: fp asimd\n")
    monkeypatch.setattr(doctor.platform, "processor", str)
    assert doctor.cpu()["model"] == doctor.platform.machine()


def test_command_prints_json_or_a_table_and_fails_with_a_problem(rows, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "compile_kernels", lambda targets, ops: rows)
    assert command.main(["--targets=sm_90,gfx942", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["kernels"] == rows
    assert torch.__version__.startswith(printed["machine"]["versions"]["torch"])  # "+cu130" may follow
    assert set(printed["machine"]["backends"]) == set(doctor.all_ops())
    assert command.main([]) == 0
    table = capsys.readouterr().out
    assert "forward E=4096 bf16" in table and "kernels compiled and fit" in table

    monkeypatch.setattr(doctor, "compile_kernels", lambda targets, ops: [rows[0] | {"error": "OutOfResources: much"}])
    assert command.main([]) == 1 and "does not compile: OutOfResources: much" in capsys.readouterr().out


def test_command_refuses_unknown_ops(capsys):
    assert run_stage("doctor", ["--ops=rope,rmsnorm"]) == 2
    assert "tritium doctor: --ops: no op is called rmsnorm; there are " in capsys.readouterr().err
