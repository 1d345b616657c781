"""What the README and docs/ say is there: commands parse, Python runs, tables are the code's, links lead somewhere."""

import dataclasses
import pathlib
import re
import shlex
from importlib import import_module

import pytest

import tritium
from tritium.bench import table
from tritium.core import arithmetic
from tritium.core.config import load
from tritium.stages.cli import STAGES

ROOT = pathlib.Path(tritium.__file__).parent
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]


def blocks(page: str, kind: str) -> list[str]:
    return [text for name, text in re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if name == kind]


def commands(page: str) -> list[str]:
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = (re.search(r"(?:\btritium |-m tritium\.stages\.)(?P<arguments>[^#]*)", line) for line in lines)
    return [match["arguments"] for match in found if match]


COMMANDS = [command for page in PAGES.values() for command in commands(page)]


def rows(text: str) -> list[list[str]]:
    """The cells of every line of every table."""
    return [[cell.strip() for cell in line.strip(" |").split("|")] for line in text.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_valid_configuration(command):
    name, *arguments = shlex.split(command)
    assert name in STAGES
    if "--config" in arguments:  # a file that the text around shows
        del arguments[(at := arguments.index("--config")) : at + 2]
    module = import_module(f"tritium.stages.{name}")
    if dataclasses.is_dataclass(getattr(module, "Config", None)):
        load(module.Config, arguments, name, "")  # raises ConfigError


@pytest.mark.parametrize("page", PAGES)
def test_commands_pasted_one_by_one_do_not_meet(page):
    """Each writes to a folder of its own, and reads a model that an earlier one wrote."""
    written = {"runs/ladder/ppo"} | ({"runs/pretrain"} if page == "docs/parallel.md" else set())
    for command in commands(PAGES[page]):
        name, *arguments = shlex.split(command)
        given = dict(argument.lstrip("-").split("=", 1) for argument in arguments if "=" in argument)
        for folder in (given.get("model"), given.get("init")):
            assert folder is None or folder in written, command
        out = given.get("run.out") or given.get("out")
        if out or name in ("pretrain", "sft", "reward", "dpo", "grpo", "ppo"):
            assert out and out not in written, f"{command}: {out}"
            written.add(out)


def test_every_stage_has_a_command():
    shown = {command.split()[0] for command in COMMANDS}
    assert shown >= set(STAGES) - {"run", "corpus", "doctor"}  # make run, its data, and a sentence


def test_the_python_runs():
    kernels, embedding = blocks(README, "python")
    exec(compile(kernels, "README.md", "exec"), {})
    trained = embedding.index("result =")
    exec(compile(embedding[:trained], "README.md", "exec"), names := {})
    names["sft"].Config(model="m", data=names["data"], run=names["run"])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", PAGES[page])
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_the_table_of_kernels_is_the_registry():
    begin, end = README.index(table.BEGIN) + len(table.BEGIN), README.index(table.END)
    assert README[begin:end] == table.kernel_table(), "python -m tritium.bench table --write"


def test_the_question_forms_are_those_of_the_generator():
    wanted = [cells for cells in rows(arithmetic.__doc__) if "---" not in cells[0]]
    assert len(wanted) > 3 and all(cells in rows(README) for cells in wanted)
