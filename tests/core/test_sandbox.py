"""The sandbox: what a program may do, what it can't, and the judge of programs, whom none of them convinces."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from tritium.bench.sandbox import ESCAPES, attempt
from tritium.core import sandbox
from tritium.core.formats import problem
from tritium.core.rewards import Answer, judge
from tritium.core.rewards.make import make_reward
from tritium.core.sandbox import LEVELS, Limits, level, run, run_python

DATA = Path(__file__).parents[3] / "shared" / "data" / "reasoning"
WAITS = ("bomb", "infinite", "sleeps", "ignores", "deep recursion", "fills", "PIPES")  # for the deadline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has containment")


def containing() -> list[str]:
    return list(LEVELS[LEVELS.index(level()) : 2])


def failures(names: list[str], at: str) -> list[tuple]:
    with ThreadPoolExecutor(4) as pool:
        verdicts = pool.map(lambda name: attempt(name, at, Limits(seconds=1.5, memory=256 << 20)), names)
    return [(n, v) for n, v in zip(names, verdicts, strict=True) if not v.contained or v.score != 0]


def test_every_escape_is_contained_and_scored_as_failed():
    assert failures(list(ESCAPES), containing()[0]) == []


def test_the_weaker_level_contains_too_what_does_not_wait():
    names = [name for name in ESCAPES if not any(word in name for word in WAITS)]
    assert failures(names, containing()[-1]) == []


@pytest.mark.parametrize("at", LEVELS[:2])
def test_an_honest_program_reads_writes_and_computes(at):
    if at not in containing():
        pytest.skip(f"this system does not allow {at}")
    code = "import sys, math, tempfile\nopen('a.txt', 'w').write('é')\ntempfile.TemporaryFile().write(b'x')\n"
    code += "print(sys.stdin.read() + open('a.txt').read(), math.factorial(5))\nsys.exit(3)"
    outcome = run_python(code, "grüße ", at=at)
    assert (outcome.stdout, outcome.returncode, outcome.killed, outcome.ok) == ("grüße é 120\n", 3, "", False)


def test_any_program_of_the_system_runs_and_one_that_is_not_there_is_the_sandboxs_failure():
    assert run(["/bin/echo", "a b"]).stdout == "a b\n"
    with pytest.raises(sandbox.SandboxError, match="No such file"):
        run(["/no/such/program"])


def test_a_programs_time_begins_with_the_program(monkeypatch):
    clock = iter([0.0])  # then, the sandbox's own start has taken 20 seconds
    monkeypatch.setattr(sandbox, "time", SimpleNamespace(monotonic=lambda: next(clock, 20.0)))
    assert run_python("print('in')", limits=Limits(seconds=5), at=level()).stdout == "in\n"


@pytest.mark.parametrize("at", LEVELS)
def test_a_program_that_closes_its_pipes_has_its_deadline_all_the_same(at):
    if at not in (*containing(), "limits"):
        pytest.skip(f"this system does not allow {at}")
    code = "import os, time\nfor i in range(3): os.close(i)\ntime.sleep(60)"
    outcome = run_python(code, limits=Limits(seconds=1), at=at)
    assert outcome.killed == "time" and not outcome.ok


def test_a_user_without_privileges_has_the_same_walls(tmp_path):
    if os.geteuid() or not shutil.which("setpriv") or not Path("/usr/bin/python3").exists():
        pytest.skip("needs root, setpriv and a Python that all may read")
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents[:3]:
        os.chmod(parent, 0o755)
    for name in ("sandbox.py", "sandbox_init.py"):
        shutil.copy(Path(sandbox.__file__).with_name(name), tmp_path)
    code = "import os, sandbox\nprint(sandbox.level())\ntry: os.listdir('/proc')\nexcept OSError: pass\n"
    code += "o = sandbox.run_python(\"import os; print(os.getuid(), os.listdir('/'))\")\nprint(o.stdout, o.stderr)"
    as_user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--inh-caps=-all", "--no-new-privs"]
    command = [*as_user, "/usr/bin/python3", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"]
    said = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60)
    assert said.stdout.startswith("namespaces\n65534"), said.stderr
    assert "proc" not in said.stdout and "home" not in said.stdout


def test_a_weaker_level_is_said_loudly_once(monkeypatch, capfd):
    real = sandbox.run_python

    def forbidding(*args, at="", **kwargs):
        if at == "namespaces":
            raise sandbox.SandboxError("unshare: Operation not permitted")
        return real(*args, at=at, **kwargs)

    monkeypatch.setattr(sandbox, "run_python", forbidding)
    sandbox.strongest.cache_clear()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert {*pool.map(lambda _: level(), range(4))} == {"confined"}
        assert capfd.readouterr().err.count("Operation not permitted") == 1
    finally:
        sandbox.strongest.cache_clear()


def code(program: str, tests: list | None = None, spec: str = "code", **record) -> float | str:
    reference = json.dumps(record | ({"tests": tests} if tests else {}))
    judged = judge(make_reward(spec), [Answer([], program, reference=reference)])
    return judged.scores[0].value if judged.scores[0] else next(iter(judged.failures))


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(x): return x + [1]", "assert f([]) == [1]"),
        ("def f(x): x.append(1)", "a = []; f(a); assert a == [1]"),
        ("def f(x): x['a'] = {1, 2}", "a = {}\nf(a)\nassert a == {'a': {2, 1}}"),
        ("def f(): return {(1, 2): frozenset([3])}", "assert f() == {(1, 2): {3}}"),
        ("def f(): return b'x', 1j, float('inf'), None", "assert f() == (b'x', 1j, float('inf'), None)"),
        ("def f(n): return n ** 200", "assert f(99) == 99 ** 200"),
        ("def f(n): return 10 ** n", "assert f(5000) == 10 ** 5000"),
        ("def f(n): yield from range(n)", "assert list(f(3)) == [0, 1, 2]"),
        ("class P:\n    def __init__(s, a): s.a = a\ndef f(p): return p[1].a", "assert f([P(1), P(2)]) == 2"),
        ("import collections\ndef f(s): return collections.Counter(s)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("class N: pass\ndef f(n): return n.left.x", "n = N(); n.left = N(); n.left.x = 3; assert f(n) == 3"),
        ("import re\ndef f(s): return re.match('a', s)", "assert f('a') and not f('b')"),
        ("def f(x): raise ValueError('no')", "try:\n    f(1); assert 0\nexcept ValueError as e: assert str(e) == 'no'"),
        ("def helper(x): return x\ndef f(x): return -x", "assert helper(f(2)) == -2"),
        ("Answer:\n```python\ndef f(x): return 1\n```\nbut better\n```\ndef f(x): return 2\n```", "assert f(0) == 2"),
        ("<think>def f(x): return 1</think>def f(x): return 2", "assert f(0) == 2"),
        ("def f(x):\n    print('noise'); return input", "assert f(0) is not None"),
    ],
)  # fmt: skip
def test_honest_programs_pass(program, test):
    assert code(program, [test]) == 1.0


def test_the_share_of_passed_tests_counts_even_where_one_never_ends():
    program, tests = "def f(x):\n    while x > 2: pass\n    return x", ["assert f(1) == 1", "assert f(2) == 3", "f(3)"]
    assert code(program, tests, "code(seconds=3)") == pytest.approx(1 / 3)
    assert code(program, tests, "code(seconds=1, fraction=False)") == 0.0


def test_a_completion_continues_its_prefix_and_a_function_may_be_called_sum():
    record = {
        "prefix": "def sum(a, b):\n    '''adds'''\n",
        "entry_point": "sum",
        "setup": "def check(c): assert c(1, 2) == 3",
    }
    for answer in ("    return a + b\n", "```python\ndef sum(a, b): return a + b\n```"):
        assert code(answer, ["check(candidate)"], **record) == 1.0


@pytest.mark.parametrize(
    ("printed", "checker", "passes"),
    [
        ("print('3 \\n')", "exact", True),
        ("print('3 4')", "exact", False),
        ("print('3\\n4')", "tokens", False),
        ("print(' 3 ')", "tokens", True),
        ("print(2.9999999)", "float", True),
        ("print(2.99)", "float", False),
        ("print(3, 3)", "float", False),
        ("print('3e0')", "float", True),
        ("print('+3')", "float", True),
        ("print('nan')", "float", False),
        ("print('3' * 9000)", "float", False),
        ("print(3); raise SystemExit(1)", "tokens", False),
    ],
)
def test_cases_are_compared_as_the_problem_wants(printed, checker, passes):
    a = "print(sum(map(int, input().split())))"
    cases = [{"input": "1 2\n", "output": "3\n"}]
    assert code(printed, cases=cases, checker=checker) == float(passes)
    assert code(a, cases=[*cases, {"input": "2 2", "output": "5"}]) == 0.5


def test_a_long_output_is_right_where_the_problem_wants_one():
    cases = [{"input": "30000", "output": "\n".join(map(str, range(30000)))}]
    assert code("print(*range(int(input())), sep='\\n')", cases=cases) == 1.0


def test_a_checker_of_the_problems_own_judges_and_where_it_fails_nobody_is_wrong():
    cases = [{"input": "", "output": "0"}]
    careless = "import sys\nprint(int(open(sys.argv[3]).read()))"
    assert code("print(1)", cases=cases, checker=careless) == 1.0
    assert code("print(2)", cases=cases, checker=careless) == 0.0
    assert code("print('no number')", cases=cases, checker=careless) == 0.0  # which ends the checker
    assert str(code("print(1)", cases=cases, checker="exakt")).endswith("NameError: name 'exakt' is not defined")


def test_whole_numbers_are_no_floats_and_what_shows_the_use_of_a_program_is_not_the_program():
    big = [{"input": "", "output": "1000000007"}]
    assert code("print(1000000008)", cases=big, checker="float") == 0.0
    assert code("print(1000000008.0)", cases=big, checker="float") == code("print(1000000007)", cases=big) == 1.0
    answer = "```python\ndef f(x): return x\n```\nUse it so:\n```python\nprint(f(2))\n```"
    assert code(answer, ["assert f(1) == 1"], entry_point="f") == 1.0


def test_programs_in_the_reasoning_are_no_answer():
    program = "```python\ndef f(x): return x\n```"
    for text in (f"<think>{program}", f"<think>{program}</think>no idea"):
        assert code(text, ["assert f(1) == 1"], entry_point="f") == 0.0
    assert code(f"<think>no idea</think>{program}", ["assert f(1) == 1"], entry_point="f") == 1.0


def test_a_problem_without_tests_or_with_broken_ones_is_the_judges_failure():
    assert 'no "tests"' in code("def f(): pass")
    assert "setup fails: NameError" in code("def f(): pass", ["f()"], setup="undefined_name")


def test_a_programming_problems_record_carries_its_tests():
    messages, reference = problem({"question": "Square?", "tests": ["assert f(2) == 4"], "entry_point": "f"})
    assert messages == [{"role": "user", "content": "Square?"}]
    assert make_reward("code")([], "def f(x): return x * x", reference=reference).solved


@pytest.mark.parametrize(
    ("file", "key"), [("HumanEval.jsonl", "canonical_solution"), ("mbpp.jsonl", "code"), ("mbpp.jsonl", "")]
)
def test_the_solutions_of_real_problems_pass_their_tests_and_empty_ones_do_not(file, key):
    if not (DATA / file).exists():
        pytest.skip(f"{DATA / file} is not there")
    records = [json.loads(line) for line in (DATA / file).read_text("utf-8").splitlines()[:12]]
    answers = [Answer([], record.get(key, "pass"), reference=problem(record)[1]) for record in records]
    judged = judge(make_reward("code"), answers)
    assert [score.value for score in judged.scores] == [float(bool(key))] * len(records) and not judged.failures
