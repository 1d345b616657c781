"""What mistakes and failures get: a sentence that says what, where and what to do; never a traceback."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tritium.core.checkpoint import checkpoints
from tritium.model.config import ModelConfig
from tritium.model.transformer import Transformer
from tritium.stages.cli import run_stage

pytestmark = pytest.mark.usefixtures("quick")


def run(capsys, stage: str, *arguments: str) -> tuple[int, str]:
    """(exit code, stderr) of a stage; never a traceback. The configuration that it shows first is left out."""
    capsys.readouterr()
    code = run_stage(stage, list(arguments))
    shown = capsys.readouterr().err
    assert "Traceback" not in shown, shown
    return code, shown.partition("\n\n[mesh]")[2] if "\n\n[mesh]" in shown else shown


@pytest.fixture
def sft(tiny, tmp_path, capsys):
    """Run `tritium sft` on a file; (exit code, stderr)."""

    def start(source: str | Path, *more: str) -> tuple[int, str]:
        arguments = [f"--model={tiny.model}", f"--data.sources={source}", f"--run.out={tmp_path / 'out'}"]
        fixed = ["--run.steps=2", "--run.dtype=fp32", "--data.bin_tokens=256", "--data.holdout=0"]
        return run(capsys, "sft", *arguments, *fixed, *more)

    return start


GOOD = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(20)]


def write(path: Path, *records: dict | str) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


# ---------------------------------------------------------------------------------------------- files


def test_a_missing_file(sft, tmp_path):
    code, shown = sft(tmp_path / "none.jsonl")
    assert code == 2 and f"data.sources: {tmp_path}/none.jsonl does not exist" in shown
    code, shown = sft(tmp_path)
    assert code == 2 and f"data.sources: {tmp_path} is a folder: name its files" in shown


def test_a_table_or_a_text_instead_of_records(sft, tmp_path):
    code, shown = sft(write(tmp_path / "chats.csv", "question,answer", "What is 1 + 1?,2"))
    assert code == 2 and "chats.csv holds no record: give a .jsonl file, a JSON object on each line" in shown


def test_preference_pairs_as_conversations(sft, tmp_path):
    code, shown = sft(write(tmp_path / "a.jsonl", {"prompt": "Why?", "chosen": "So.", "rejected": "No."}))
    assert code == 2 and 'a record without an answer ("chosen" and "rejected" are for reward and dpo)' in shown


@pytest.mark.parametrize("number", ["optim.lr=inf", "run.epochs=inf", "schedule.warmup=inf", "finetune.neftune=nan"])
def test_a_number_that_is_none(sft, tmp_path, number):
    """lr=inf ended with exit code 0 and a model of NaNs, epochs=inf in a traceback."""
    code, shown = sft(write(tmp_path / "a.jsonl", *GOOD), f"--{number}")
    assert code == 2 and f"--{number}: expected float" in shown


def test_an_empty_file(sft, tmp_path):
    code, shown = sft(write(tmp_path / "empty.jsonl"))
    assert code == 2 and "empty.jsonl is empty" in shown


def test_a_file_that_is_not_utf8(sft, tmp_path):
    (file := tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9?", "answer": "1"}\n')
    code, shown = sft(file)
    assert code == 2 and "latin.jsonl is not UTF-8 text (byte 17 is 0xe9); convert it" in shown


def test_raw_text_that_is_not_utf8(tiny, tmp_path, capsys):
    (file := tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    code, shown = run(capsys, "pretrain", f"--init={tiny.model}", f"--data.sources={file}", f"--run.out={tmp_path}/o")
    assert code == 2 and "latin.txt is not UTF-8 text" in shown


def test_an_array_is_not_called_badly_encoded_text(tiny, tmp_path, capsys):
    np.save(tmp_path / "a.starts.npy", np.arange(3))
    source = f"--data.sources={tmp_path}/a.starts.npy"
    for command in (["pretrain", f"--init={tiny.model}"], ["pretrain"], ["sft", f"--model={tiny.model}"]):
        code, shown = run(capsys, *command, source, f"--run.out={tmp_path}/o")
        assert code == 2 and "a.starts.npy is no text: of curate's pack, pretrain takes FILE.tokens.npy" in shown


# ---------------------------------------------------------------------------------------------- records


def test_a_malformed_line_is_skipped_counted_and_shown(sft, tmp_path):
    file = write(tmp_path / "a.jsonl", *GOOD, '{"question": "What', *GOOD)
    code, shown = sft(file)
    assert code == 0 and f"skipped 1 × malformed JSON (first: {file}:21)" in shown


def test_a_malformed_line_stops_where_that_is_asked(sft, tmp_path):
    file = write(tmp_path / "a.jsonl", *GOOD, '{"question": "What')
    code, shown = sft(file, "--data.on_error=raise")
    assert code == 2 and f"{file}:21: malformed JSON" in shown


def test_a_record_without_an_answer(sft, tmp_path):
    file = write(tmp_path / "a.jsonl", *GOOD, {"question": "Why?"}, {"question": "How?", "answer": ""})
    code, shown = sft(file)
    assert code == 0 and f"(first: {file}:21)" in shown and "without an answer" in shown
    code, shown = sft(write(tmp_path / "b.jsonl", {"question": "Why?"}))
    assert code == 2 and "b.jsonl holds no usable record" in shown and "1 × a record without an answer" in shown


def test_a_problem_without_an_answer(tiny, tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", {"question": "Why?"}, {"instruction": "Why?", "answer": "1", "history": [1]})
    code, shown = run(capsys, "evaluate", f"--model={tiny.model}", f"--data={file}")
    assert code == 2 and "holds no usable problem" in shown and "1 × a record without an answer" in shown


def test_a_conversation_longer_than_the_context(sft, tmp_path):
    long = [{"question": "What?", "answer": "very " * 99}, {"question": "why " * 99, "answer": "1"}]
    file = write(tmp_path / "a.jsonl", *GOOD, *long)
    code, shown = sft(file)
    assert code == 0 and "skipped 2 × a record longer than the context of " in shown
    assert f" tokens (data.on_overlong=truncate cuts) (first: {file}:21)" in shown
    code, shown = sft(file, "--data.on_overlong=truncate", f"--run.out={tmp_path}/other")
    assert code == 0 and f"1 × a record without a supervised token within the context (first: {file}:22)" in shown


def test_pairs_longer_than_the_context_can_be_cut(tiny, tmp_path, capsys):
    long = {"prompt": "Why?", "chosen": "because " * 99, "rejected": "no " * 99}
    file = write(tmp_path / "a.jsonl", *[long] * 4)
    arguments = [f"--model={tiny.model}", f"--data.sources={file}", f"--run.out={tmp_path}/out", "--run.steps=1"]
    assert run(capsys, "dpo", *arguments)[0] == 2
    assert run(capsys, "dpo", *arguments, "--data.on_overlong=truncate")[0] == 0


def test_a_weight_that_leaves_nothing(sft, tmp_path):
    file = write(tmp_path / "a.jsonl", GOOD[0])
    code, shown = sft(f"{file}@0.3")
    assert code == 2 and "an epoch of these sources is empty" in shown


# ---------------------------------------------------------------------------------------------- models


def test_a_vocabulary_larger_than_the_text_supports(tmp_path, capsys):
    (file := tmp_path / "small.txt").write_text("a small text\n" * 30)
    command = ["pretrain", f"--data.sources={file}", f"--run.out={tmp_path}/out"]
    code, shown = run(capsys, *command, "--vocab_size=8192")
    assert code == 2 and "too small for a vocabulary of 8192: the largest possible is " in shown
    assert "steps between checkpoints" not in shown and len(shown.splitlines()) < 20  # not under all the settings


def test_a_model_that_is_not_there(sft, tmp_path):
    code, shown = sft(write(tmp_path / "a.jsonl", *GOOD), f"--model={tmp_path}/none")
    assert code == 2 and "none' does not exist (nothing is downloaded)" in shown
    code, shown = sft(file := write(tmp_path / "a.jsonl", *GOOD), f"--model={file}")
    assert code == 2 and "a.jsonl' is a file: name its folder" in shown


def test_a_model_folder_whose_tensors_do_not_fit(sft, tiny, tmp_path):
    folder = tmp_path / "model"
    Transformer(ModelConfig(340, 32, 64, 2, 2, 1, 16)).initialize(0).save(str(folder))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"intermediate_size": 48, "num_hidden_layers": 1}))
    code, shown = sft(write(tmp_path / "a.jsonl", *GOOD), f"--model={folder}")
    assert code == 2 and "mlp.gate_proj.weight is [64, 32], config.json wants [48, 32]" in shown
    assert "model.layers.1.mlp.down_proj.weight is not part of this model" in shown


def test_a_model_with_a_smaller_vocabulary_than_the_tokenizer(tiny, tmp_path, sft):
    folder = tmp_path / "model"
    Transformer(ModelConfig(300, 32, 64, 1, 2, 1, 16)).initialize(0).save(str(folder))
    (folder / "tokenizer.model").write_bytes(Path(tiny.model, "tokenizer.model").read_bytes())
    code, shown = sft(write(tmp_path / "a.jsonl", *GOOD), f"--model={folder}")
    assert code == 2 and "the tokenizer has 340 tokens, the model only 300" in shown


@pytest.mark.parametrize("option", ["--model.layers=1", "--model.hidden_size=16", "--tokenizer="])
def test_a_checkpoint_of_another_shape(tiny, tmp_path, capsys, option):
    out = Path(tmp_path / "out")
    shape = ["--model.layers=2", "--model.hidden_size=32", "--model.intermediate_size=64", "--model.head_dim=16"]
    fixed = [f"--data.sources={tiny.data('text.jsonl')}", f"--run.out={out}", "--run.steps=1", "--vocab_size=330"]
    assert run(capsys, "pretrain", f"--tokenizer={tiny.model}", *shape, *fixed)[0] == 0
    before = {p: p.read_bytes() for folder in checkpoints(out) for p in folder.rglob("*") if p.is_file()}
    code, shown = run(capsys, "pretrain", f"--tokenizer={tiny.model}", *shape, *fixed, option)
    assert code == 2 and f"{out} holds a run with another configuration" in shown and "use another --run.out" in shown
    assert before == {p: p.read_bytes() for folder in checkpoints(out) for p in folder.rglob("*") if p.is_file()}


def test_the_same_command_after_its_model_was_replaced(sft, tiny, tmp_path):
    folder, file = tmp_path / "model", write(tmp_path / "a.jsonl", *GOOD)
    for layers, code in ((2, 0), (1, 2)):
        Transformer(ModelConfig(340, 32, 64, layers, 2, 1, 16)).initialize(0).save(str(folder))
        (folder / "tokenizer.model").write_bytes(Path(tiny.model, "tokenizer.model").read_bytes())
        found, shown = sft(file, f"--model={folder}")
        assert found == code
    assert "step-00000002 does not fit this model" in shown


# ---------------------------------------------------------------------------------------------- failures


def test_a_full_disk_at_the_last_checkpoint(sft, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        code, shown = sft(write(tmp_path / "a.jsonl", *GOOD), "--run.save_every=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "step-00000002 could not be written: " in shown and "free some space" in shown
    assert "step-00000001 could not be written" in shown and "the run continues" in shown
    assert not checkpoints(tmp_path / "out") and not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tiny, capsys):
    code, shown = run(capsys, "chat", f"--model={tiny.model}", "--device=cuda")
    assert code == 2 and "torch sees no GPU here" in shown


def test_what_can_be_known_to_be_wrong_leaves_nothing_behind(tiny, tmp_path, capsys):
    asked = [f"--model={tiny.model}", f"--sources={tmp_path}/none.jsonl", f"--out={tmp_path}/out/answers.jsonl"]
    commands = [
        (["generate", *asked], f"sources: {tmp_path}/none.jsonl does not exist"),
        (["corpus", f"--out={tmp_path}/out", "--test=-1"], "test=-1 must be at least 0"),
    ]
    problems, missing = tiny.data("problems.jsonl"), f"--model={tmp_path}/none"
    stages = [(["sample", f"--sources={problems}", f"--out={tmp_path}/out"])]
    files = {"sft": "chats.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl", "grpo": "problems.jsonl"}
    stages += [(stage, f"--data.sources={tiny.data(f)}", f"--run.out={tmp_path}/out") for stage, f in files.items()]
    commands += [([*stage, missing], f"the folder '{tmp_path}/none' does not exist") for stage in stages]
    for command, words in commands:
        code, shown = run(capsys, *command)
        assert code == 2 and words in shown and not (tmp_path / "out").exists(), command


def test_a_folder_that_cannot_be_written(sft, tmp_path):
    (tmp_path / "file").write_text("")
    code, shown = sft(write(tmp_path / "a.jsonl", *GOOD), f"--run.out={tmp_path}/file/out")
    assert code == 2 and f"run.out={tmp_path}/file/out can't be written: Not a directory" in shown


def test_two_processes_in_one_folder(sft, tmp_path):
    (tmp_path / "out").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command, file = [sys.executable, "-c", hold, f"{tmp_path}/out/.lock"], write(tmp_path / "a.jsonl", *GOOD)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        (tmp_path / "out/metrics.jsonl").write_text(logged := '{"step": 1}\n')
        code, shown = sft(file)
        assert code == 2 and f"run.out={tmp_path}/out: another process writes there" in shown
        assert not checkpoints(tmp_path / "out") and (tmp_path / "out/metrics.jsonl").read_text() == logged
        other.communicate(b"\n")
    assert sft(file)[0] == 0


@pytest.mark.parametrize("harm", ["bit flip", "truncation"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(sft, tmp_path, harm):
    file = write(tmp_path / "a.jsonl", *GOOD)
    assert sft(file, "--run.steps=4", "--run.save_every=2")[0] == 0
    weights = tmp_path / "out" / "step-00000004" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 16
    weights.write_bytes(content if harm == "bit flip" else content[:-100])
    code, shown = sft(file, "--run.steps=6", "--run.save_every=2")
    assert code == 0 and "step-00000004 is damaged: model.safetensors" in shown
    assert f"resuming from {tmp_path}/out/step-00000002" in shown
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["step-00000004", "step-00000006"]


def test_ctrl_c_saves_and_a_rerun_ends_as_an_uninterrupted_run(tiny, tmp_path, capsys):
    steps, file = 60, write(tmp_path / "a.jsonl", *GOOD)
    arguments = [f"--model={tiny.model}", f"--data.sources={file}", f"--run.steps={steps}", "--run.dtype=fp32"]
    arguments += ["--data.bin_tokens=256", "--data.holdout=0", "--run.save_every=1000"]
    command = [sys.executable, "-m", "tritium.stages.sft", *arguments, f"--run.out={tmp_path}/cut"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:  # until the first step has been made
            if "step 1/" in line:
                break
        process.send_signal(signal.SIGINT)
        shown = process.stderr.read()
    assert process.returncode == 130 and "tritium sft: interrupted" in shown and "Traceback" not in shown
    (saved,) = checkpoints(tmp_path / "cut")
    assert 1 <= int(saved.name.removeprefix("step-")) < steps

    code, shown = run(capsys, "sft", *arguments, f"--run.out={tmp_path}/cut")
    assert code == 0 and f"resuming from {saved}" in shown
    assert run(capsys, "sft", *arguments, f"--run.out={tmp_path}/whole")[0] == 0
    for name in ("model.safetensors", "trainer/policy.safetensors"):
        cut, whole = (tmp_path / way / f"step-{steps:08d}" / name for way in ("cut", "whole"))
        assert cut.read_bytes() == whole.read_bytes(), name
    found = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert found == list(range(1, steps + 1))


def test_a_verifier_that_fails_is_told_and_takes_part_in_nothing(tiny, tmp_path, capsys, monkeypatch):
    def broken(ids, text, **_):
        raise OSError("the grader is down")

    monkeypatch.setattr("tritium.core.experience.open_reward", lambda *_: broken)
    arguments = [f"--model={tiny.model}", f"--data.sources={tiny.data('problems.jsonl')}", f"--run.out={tmp_path}"]
    more = ["--run.steps=1", "--run.dtype=fp32", "--grpo.prompts=2", "--grpo.group=2", "--sampling.max_tokens=4"]
    assert run(capsys, "grpo", *arguments, *more)[0] == 0
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["verifier_failures"] == 4 and "grad_norm" not in metrics
    before, after = (Path(folder, "model.safetensors") for folder in (tiny.model, tmp_path / "step-00000001"))
    assert before.read_bytes() == after.read_bytes()
