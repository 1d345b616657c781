"""`python -m tritium.bench kernels` from end to end, on shapes of a few kilobytes; and what it refuses to say."""

import dataclasses
import json
import math
import xml.etree.ElementTree as xml

import pytest
import torch

from tritium.bench import case as cases
from tritium.bench import kernels, measure, providers, table
from tritium.bench.__main__ import main
from tritium.kernels import all_ops, rms_norm

OPS = all_ops()
WORDS = {"op", "dtype", "provider", "pass", "status", "bound", "device", "backend", "date"}
NUMBERS = {"ms", "ms_p20", "ms_p80", "rounds", "gbps", "tflops", "of_ceiling", "copy_gbps", "matmul_tflops", "error"}
NUMBERS |= {"memory_bytes", "working_bytes", "threads", "load"}
SOMETIMES = {"reason", "speedup", "of_bare"}
TREES = {"shape", "checked_shape", "machine"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Caches and ceilings of a few kilobytes: the numbers mean nothing, and come at once."""
    monkeypatch.setattr(measure, "_CACHE_BYTES", {"cpu": 1 << 12})
    monkeypatch.setattr(measure, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(measure, "_MATMUL_SIZE", {"cpu": 32})
    monkeypatch.setattr(cases, "IMPOSSIBLE", math.inf)  # but where a test asks: these ceilings are noise
    monkeypatch.setenv("TRITIUM_BACKEND", "torch")


def run(tmp_path, *arguments):
    """The exit code and the rows of a run."""
    file = tmp_path / "rows.jsonl"
    code = main(["kernels", "--device=cpu", "--seconds=0", f"--out={tmp_path}", f"--jsonl={file}", *arguments])
    return code, [json.loads(line) for line in file.read_text().splitlines()]


def replaced(monkeypatch, name, **changes):
    monkeypatch.setitem(OPS, name, dataclasses.replace(OPS[name], **changes))


def test_every_number_of_every_row_is_there(tmp_path, capsys):
    own = "--providers=tritium,torch eager"
    code, rows = run(
        tmp_path, "--ops=rms_norm,global_norm", "--shape=T=64,E=32,N=500", own, "--dtypes=float32,bfloat16"
    )
    assert code == 0
    assert [(row["op"], row["pass"]) for row in rows[:6:2]] == [("rms_norm", p) for p in measure.PASSES]
    assert len(rows) == 2 * 2 * 3 + 2 * 2  # dtypes × providers × passes; global_norm has no backward
    for row in rows:
        assert set(row) == WORDS | NUMBERS | SOMETIMES | TREES
        assert row["status"] == "ok" and row["reason"] is None
        assert all(isinstance(row[key], str) for key in WORDS)
        assert all(math.isfinite(row[key]) and row[key] >= 0 for key in NUMBERS)
        assert row["speedup"] > 0 and row["copy_gbps"] > 0 and row["matmul_tflops"] > 0
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["rounds"] >= 5
        assert {"cpu", "torch", "tritium"} <= set(row["machine"])
    shown = capsys.readouterr().out
    assert "rms_norm  T=64 E=32  bfloat16" in shown and "GB/s" in shown and "× eager" in shown
    for op in ("rms_norm", "global_norm"):
        chart = xml.parse(tmp_path / "cpu" / f"{op}.svg").getroot()
        bars = [node for node in chart.iter() if node.get("class", "").startswith("bar")]
        assert len(bars) == sum(row["op"] == op for row in rows)


def test_who_is_wrong_gets_no_speedup(tmp_path, capsys, monkeypatch):
    replaced(monkeypatch, "rms_norm", function=lambda x, weight: rms_norm(x, weight) * 1.01)
    code, rows = run(tmp_path, "--ops=rms_norm", "--shape=T=64,E=32", "--quick")
    assert code == 1
    for row in rows:
        wrong = row["provider"] == "tritium"
        assert row["status"] == ("failed" if wrong else "ok") and (row["speedup"] is None) == wrong and row["ms"] > 0
    assert "FAILED: it is wrong" in capsys.readouterr().out
    assert "FAILED" in (tmp_path / "cpu" / "rms_norm.svg").read_text()


@pytest.mark.parametrize("spoilt, status", [("a gradient", "failed"), ("nan", "failed"), ("shape", "error")])
def test_the_check_sees(tmp_path, monkeypatch, spoilt, status):
    def function(x, weight):
        y = rms_norm(x, weight)
        if spoilt == "a gradient":
            y = y + 0.01 * (weight - weight.detach())
        return y[None] if spoilt == "shape" else y * math.nan if spoilt == "nan" else y

    replaced(monkeypatch, "rms_norm", function=function)
    code, rows = run(tmp_path, "--ops=rms_norm", "--shape=T=64,E=32", "--providers=tritium")
    assert code == 1 and all((row["status"], row["speedup"]) == (status, None) for row in rows)


def test_what_a_provider_cannot_do_is_a_row_with_the_reason(tmp_path, capsys, monkeypatch):
    def never(x, weight):
        raise torch.OutOfMemoryError("no memory for this")

    replaced(monkeypatch, "rms_norm", function=never)
    code, rows = run(tmp_path, "--ops=rms_norm", "--shape=T=64,E=32", "--providers=tritium,F.rms_norm")
    assert code == 1
    ours, other = rows[0], rows[1]
    assert ours["status"] == "error" and ours["reason"] == "OutOfMemoryError: no memory for this" and ours["ms"] is None
    assert other["status"] == "ok" and other["speedup"] is None  # torch eager was not asked for
    assert "no memory for this" in capsys.readouterr().out


def test_attention_and_the_heads_meet_their_peers(tmp_path):
    peers = "--providers=tritium,torch eager,SDPA flash,bare matmuls"
    shape = "--shape=T=48,N=20,H=2,G=1,D=16,E=16,V=50"
    code, rows = run(tmp_path, "--ops=attention,linear_logprob,linear_cross_entropy", shape, peers)
    assert code == 0
    found = {(row["op"], row["provider"]): row for row in rows if row["pass"] == "both"}
    assert found["attention", "SDPA flash"]["status"] == "ok"
    for op in ("linear_logprob", "linear_cross_entropy"):
        assert found[op, "bare matmuls"]["status"] == "unchecked" and found[op, "bare matmuls"]["error"] is None
        assert found[op, "tritium"]["of_bare"] > 0


def test_large_heads_are_measured_on_a_cpu_and_not_when_quick():
    def shapes(**options):
        device, planned = kernels._plan(kernels.Config(device="cpu", ops=["linear_logprob"], **options))
        assert device == "cpu"
        return [(case.shape["V"], [provider.name for provider in case.providers]) for case in planned]

    assert shapes()[1:] == [(49152, ["tritium", "bare matmuls"])]
    assert len(shapes(quick=True)) == len(shapes(shape={"V": 64})) == len(shapes(dtypes=["float32"])) == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--ops=rmsnorm"], "--ops: no 'rmsnorm'; did you mean rms_norm?"),
        (["--ops=rope", "--shape=Q=3"], "--shape: no 'Q'. There are: D, G, H, T"),
        (["--shape=T=0"], "--shape: got 0, wanted 1 or more"),
        (["--providers=tritum"], "did you mean tritium?"),
        (["--dtypes=bf16"], "expected one of float32, bfloat16, float16"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(capsys, arguments, said):
    assert main(["kernels", "--device=cpu", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_benchmark(capsys):
    assert main(["kernel"]) == 2 and "no benchmark 'kernel'; did you mean kernels?" in capsys.readouterr().err


def test_the_shapes_for_cpus_are_shapes_of_the_ops():
    assert set(kernels.CPU_SHAPES) == set(OPS)
    for name, shape in kernels.CPU_SHAPES.items():
        assert set(shape) <= set(OPS[name].shape)
    assert set(providers.LOOPS) <= set(OPS) and set(providers.OPTIONS) <= set(OPS)


def test_a_large_shape_is_checked_with_fewer_tokens(monkeypatch):
    monkeypatch.setitem(cases.CHECK_FLOPS, "cpu", 1000)
    case = cases.Case(OPS["rms_norm"], {"T": 64, "E": 32}, torch.float32, "cpu", ())
    assert cases.check(case)[0] == {"T": 4, "E": 32}


def test_the_limit_is_the_ceiling_that_takes_longer():
    assert cases._rates((1, 100_000_000), 1.0, 200.0, 1.0)["bound"] == "memory"
    found = cases._rates((10**9, 1), 1.0, 200.0, 2.0)
    assert found["bound"] == "matmul" and found["of_ceiling"] == pytest.approx(0.5)


def test_gradients_made_forward_are_not_compared_by_pass(monkeypatch):
    monkeypatch.setattr(cases, "IMPOSSIBLE", 4)

    def row(provider, kind, ms, of_ceiling):
        same = {"reason": None, "status": "ok", "speedup": None, "of_bare": None}
        return same | {"provider": provider, "pass": kind, "ms": ms, "of_ceiling": of_ceiling}

    rows = [row("torch eager", kind, 10.0, 0.5) for kind in measure.PASSES]
    rows += [row("early", "forward", 8.0, 0.5), row("early", "backward", 0.1, 50.0), row("early", "both", 8.1, 0.9)]
    forward, backward, both = cases._compared(rows)[3:]
    assert forward["speedup"] is backward["speedup"] is backward["of_ceiling"] is None
    assert "made forward" in backward["reason"] and both["speedup"] == pytest.approx(10 / 8.1)


def test_memory_is_the_peak_above_the_inputs():
    def function(x):
        large = torch.ones(8 << 20)  # 32 MiB that nobody keeps
        return x * large.sum()

    call = measure.Call(function, (torch.ones(1 << 20, requires_grad=True),), {})
    call.results()
    found = measure.memory_of(call, "cpu")
    if found["forward"] is None:
        pytest.skip("this system doesn't tell a process its peak")
    memory, working = found["forward"]
    assert abs(working - (32 << 20)) < 2 << 20 and abs(memory - (36 << 20)) < 2 << 20
    assert found["both"].memory_bytes >= found["forward"].memory_bytes


def test_the_table_goes_between_its_markers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table.tritium, "__file__", str(tmp_path / "__init__.py"))
    assert main(["table", "--write"]) == 2 and "README.md: no such file" in capsys.readouterr().err
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}old\n{table.END}after\n")
    assert main(["table", "--write"]) == 0
    assert readme.read_text() == f"before\n{table.BEGIN}{table.kernel_table()}{table.END}after\n"
    assert "old" not in readme.read_text() and "| `rms_norm` |" in readme.read_text()
