"""The `tritium` command: what it prints and the exit code that a script sees."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

import tritium
from tritium.core.config import UserError, opt
from tritium.core.run import Result
from tritium.stages.cli import STAGES, main, run_stage


@dataclass
class Config:
    steps: int = opt(3, "number of updates")


def stage(train) -> ModuleType:
    """A stage whose training is the function `train`."""
    module = ModuleType("tritium.stages.toy", "Train a toy.\n\nMore about it.")
    module.Config, module.train = Config, train
    return module


def fail(error: BaseException):
    def train(config):
        raise error

    return stage(train)


def test_a_stage_gets_its_configuration_and_shows_it(capsys):
    seen = []

    def train(config):
        seen.append(config)
        return Result("runs/toy/step-7", {"eval_loss": 1.25})

    assert run_stage(stage(train), ["--steps=7"]) == 0
    assert seen == [Config(steps=7)]
    shown = capsys.readouterr().err
    assert "steps = 7" in shown and shown.count(" = ") == 1  # what is not the default
    assert "done: runs/toy/step-7  eval_loss=1.25" in shown


def test_only_the_main_rank_shows_the_configuration(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_stage(stage(lambda config: None), []) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("data.jsonl, line 3: no text"), 2, "tritium toy: data.jsonl, line 3: no text\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("boom"), 1, "RuntimeError: boom"),
        (AssertionError(), 1, "Traceback"),
    ],
)
def test_errors_become_exit_codes(error, code, words, capsys):
    assert run_stage(fail(error), []) == code
    shown = capsys.readouterr().err
    assert words in shown and ("Traceback" in shown) == (code == 1)


def test_a_wrong_option_is_a_sentence(capsys):
    assert run_stage(stage(lambda config: None), ["--step=1"]) == 2
    shown = capsys.readouterr().err
    assert "--step: no such option; did you mean --steps?" in shown and "Traceback" not in shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_signals_reach_the_stage_as_ctrl_c_and_have_their_exit_codes(number, code):
    saved, before = [], signal.getsignal(number)

    def train(config):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            saved.append("state")
            raise

    assert run_stage(stage(train), []) == code
    assert saved == ["state"] and signal.getsignal(number) == before


@pytest.mark.parametrize("joined", ["", "2>&1"])
@pytest.mark.parametrize("arguments", ["--help", "sft --help", "sft --config=/none.toml"])
def test_output_that_nobody_reads_ends_a_command_without_a_traceback(arguments, joined, tmp_path):
    """`tritium --help | head -1`"""
    command = f"({sys.executable} -m tritium.stages {arguments} {joined}; echo $? > {tmp_path}/code) | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "BrokenPipe" not in done.stderr and "Traceback" not in done.stderr
    told = arguments.endswith("toml") and not joined
    assert (tmp_path / "code").read_text() == ("2\n" if told else "141\n")


def test_a_module_with_main_is_called_with_the_arguments():
    module = ModuleType("tritium.stages.toy")
    module.main = lambda argv: len(argv)
    assert run_stage(module, ["a", "b", "c"]) == 3


@pytest.mark.parametrize("name", ["run", "corpus", "tokenizer", "chat"])
def test_what_is_for_one_process_refuses_torchrun(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    assert run_stage(name, ["--model=m"] if name == "chat" else []) == 2
    assert "runs in one process: start it without torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_in_torchruns_report_too(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert run_stage(stage(lambda config: None), ["--step=1"]) == 2
    said = capsys.readouterr().err.strip()
    assert "did you mean --steps?" in said
    assert json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["py_callstack"] == said


def test_help_has_no_python_in_its_sentences(capsys):
    for stage in ("dpo", "reward"):
        with pytest.raises(SystemExit):
            main([stage, "--help"])
        shown = capsys.readouterr().out
        assert "label_smoothing" in shown and "('" not in shown and "['" not in shown


def test_help_of_a_stage(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_stage(stage(lambda config: None), ["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "Train a toy." in shown and "--steps" in shown and "More about" not in shown


def test_local_ranks_share_the_cores(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(2)
    seen = []

    def train(config):
        seen.append(torch.get_num_threads())
        return Result("")

    try:
        assert run_stage(stage(train), []) == 0
        monkeypatch.setenv("OMP_NUM_THREADS", "5")  # chosen by the user: left alone
        torch.set_num_threads(2)
        assert run_stage(stage(train), []) == 0
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 2]


def test_overview_lists_every_stage_with_its_line(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and line in shown for name, line in STAGES.items())


def test_no_arguments_is_not_a_success():
    assert main([]) == 2


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"tritium {tritium.__version__}"


def test_an_unknown_stage_gets_the_nearest_and_the_list(capsys):
    assert main(["pretran"]) == 2
    shown = capsys.readouterr().err
    assert "did you mean pretrain?" in shown and all(name in shown for name in STAGES)


def test_an_unknown_stage_is_no_attribute():
    with pytest.raises(AttributeError, match="no stage 'nothing'"):
        _ = tritium.stages.nothing


def test_python_dash_m_is_the_same_command_and_needs_no_torch_to_answer():
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['tritium', '--help'];"
    code += "runpy.run_module('tritium.stages', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "pretrain" in done.stdout, done.stderr
