"""The judge of programs: by asserts, and by what they print for what they read, in the sandbox.

The reference is JSON, which `formats.problem` makes of a problem's record:

    {"tests": ["assert f(2) == 4", …], "setup"?: "import math", "entry_point"?: "f", "prefix"?: "def f(x):"}
    {"cases": [{"input": "1 2", "output": "3"}, …], "checker"?: "exact" | "tokens" | "float" | a program in Python}
"""

import json
import math
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tritium.core.chat import parse_reasoning
from tritium.core.rewards import Answer, Score, score_one
from tritium.core.sandbox import PYTHON_ARGV, Limits, Outcome, Sandbox, level, run, run_python

FENCED = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
WHOLE, LONGEST = re.compile(r"[-+]?\d+"), 4000  # digits of an integer, which Python reads
PIPE = Path(__file__).with_name("code_pipe.py")


@dataclass(frozen=True)
class Code:
    """The share of the tests that a Python program passes (`fraction` False: 1 where all do, else 0).

    The program is the answer's last fenced block, or all of it; where the reference has a "prefix" (HumanEval) and the
    program does not define the entry point, it continues the prefix. `seconds` is for all asserts, or for each case.
    Right is what passes all.
    """

    fraction: bool = True
    seconds: float = 10.0
    memory: int = 512 << 20
    at: str = ""  # the sandbox's level (default: the strongest)

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        spec = json.loads(reference or "{}")
        if not spec.get("tests") and not spec.get("cases"):
            raise ValueError('the problem has no "tests" and no "cases" to run')
        program = extract(text, spec)
        limits = Limits(seconds=self.seconds, memory=self.memory)
        passed = (by_asserts if spec.get("tests") else by_cases)(program, spec, limits, self.at or level())
        share = sum(passed) / len(passed)
        value = share if self.fraction else float(share == 1)
        return Score(value, f"{sum(passed)} of {len(passed)} tests passed", right=share == 1)

    def batch(self, answers: Sequence[Answer]) -> list[Score | Exception]:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
            return list(pool.map(lambda answer: score_one(self, answer), answers))


def extract(text: str, spec: dict) -> str:
    """The program in an answer. Of several blocks of code it is the last that defines the entry point: one that shows
    how it is used may follow."""
    prefix, entry = spec.get("prefix"), spec.get("entry_point")
    defines = re.compile(rf"^def {re.escape(entry or '')}\b" if entry else "", re.MULTILINE)
    answer = text if prefix and "think>" not in text else parse_reasoning(text)[1]  # a continuation is indented
    blocks = FENCED.findall(answer)
    program = ([b for b in blocks if defines.search(b)] or blocks or [answer])[-1]
    return prefix + program if prefix and not defines.search(program) else program


def by_asserts(program: str, spec: dict, limits: Limits, at: str) -> list[bool]:
    """Which tests pass: the program in one sandbox, the tests in another (see code_pipe.py).

    Raises: ValueError where the setup of the tests fails; SandboxError.
    """
    pipe, calls, replies = PIPE.read_text("utf-8"), os.pipe(), os.pipe()
    argv = [*PYTHON_ARGV, PIPE.name]
    ends = [*calls, *replies]
    try:
        with (
            Sandbox([*argv, "candidate"], {PIPE.name: pipe, "program.py": program}, limits, at, stdin=calls[0],
                    stdout=replies[1], stderr=subprocess.DEVNULL),
            Sandbox([*argv, "checker"], {PIPE.name: pipe, "tests.json": json.dumps(spec)}, limits, at,
                    stdin=replies[0], stdout=calls[1], stderr=subprocess.PIPE) as checker,
        ):  # fmt: skip
            while ends:
                os.close(ends.pop())  # ours: an end is reached when theirs are closed
            _, (verdicts,) = checker.communicate(b"")
            if verdicts.startswith(b"E"):
                raise ValueError(f"the tests' setup fails: {verdicts.decode(errors='replace')[2:]}")
            if not verdicts:
                checker.end()  # raises where it never began
    finally:
        for number in ends:
            os.close(number)
    return [verdicts[i : i + 1] == b"P" for i in range(len(spec["tests"]))]


def by_cases(program: str, spec: dict, limits: Limits, at: str) -> list[bool]:
    """Which cases pass: the program is run once for each. Raises: ValueError for a checker that fails; SandboxError."""
    checker = spec.get("checker", "tokens")
    most = max(limits.output, *(2 * len(case["output"].encode()) for case in spec["cases"]))  # a right one may be long
    limits = replace(limits, output=most)
    runs = ((run_python(program, case["input"], limits, at), case) for case in spec["cases"])
    return [outcome.ok and accepts(checker, case, outcome.stdout, limits, at) for outcome, case in runs]


def accepts(checker: str, case: dict, printed: str, limits: Limits, at: str) -> bool:
    """Whether what was printed is right. A problem's own checker reads three files and prints 1 or 0 (Open-R1's).

    Raises: ValueError where that fails on the right output, too.
    """
    if checker in CHECKERS:
        return CHECKERS[checker](printed, case["output"])
    files = {"checker.py": checker, "input.txt": case["input"], "correct_output.txt": case["output"]}

    def judged(output: str) -> Outcome:
        given = files | {"solution_output.txt": output}
        return run([*PYTHON_ARGV, *given], "", given, limits, at)

    if not (verdict := judged(printed)).ok and not (fails := judged(case["output"])).ok:
        why = fails.killed or fails.stderr.strip().split("\n")[-1]
        raise ValueError(f"the problem's checker fails: {why}")
    return verdict.ok and verdict.stdout.strip() == "1"


def exact(a: str, b: str) -> bool:
    """Up to white space at the ends of lines and of the text."""
    return [line.rstrip() for line in a.rstrip().split("\n")] == [line.rstrip() for line in b.rstrip().split("\n")]


def tokens(a: str, b: str) -> bool:
    return a.split() == b.split()


def floats(a: str, b: str) -> bool:
    """Numbers within 1e-6, relative or absolute; two whole ones, and all else, as tokens."""
    pairs = list(zip(a.split(), b.split(), strict=False))
    return len(a.split()) == len(b.split()) and all(x == y or close(x, y) for x, y in pairs)


def close(a: str, b: str) -> bool:
    if WHOLE.fullmatch(a) and WHOLE.fullmatch(b):
        return int(a[:LONGEST]) == int(b[:LONGEST]) and len(a) < LONGEST
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-6, abs_tol=1e-6)
    except ValueError:
        return False


CHECKERS = {"exact": exact, "tokens": tokens, "float": floats}
