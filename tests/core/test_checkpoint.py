"""Checkpoints: whole or not there, found again, and never trusted when damaged."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tritium.core.checkpoint import (
    CheckpointError,
    checkpoints,
    damage,
    latest,
    model_folder,
    prune,
    read_state,
    read_tensors,
    save_checkpoint,
)
from tritium.parallel.mesh import Mesh

MESH = Mesh.single()


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"policy": {"master.w": torch.full((50, 50), float(step)), "step": torch.tensor(float(step))}}


def export(folder: str) -> None:
    (Path(folder) / "config.json").write_text("{}")


def save(run: Path, step: int) -> Path:
    folder = run / f"step-{step:08d}"
    save_checkpoint(folder, MESH, export, tensors(step), {"step": step})
    return folder


def newest(run: Path) -> tuple[Path | None, list[str]]:
    told: list[str] = []
    return latest(run, MESH, told.append), told


@contextmanager
def files_no_larger_than(size: int):
    """What a full disk looks like to a writer: an OSError in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def flip(file: Path) -> None:
    """Turn one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_what_is_saved_is_read_back(tmp_path):
    folder = save(tmp_path, 3)
    found = read_tensors(folder, "policy", torch.device("cpu"))
    assert found.keys() == tensors(3)["policy"].keys()
    assert all(torch.equal(found[k], v) for k, v in tensors(3)["policy"].items())
    assert read_state(folder) == {"step": 3} and damage(folder) == ""


def test_every_file_but_the_manifest_is_in_the_manifest_and_none_is_a_pickle(tmp_path):
    folder = save(tmp_path, 3)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {"config.json", "manifest.json", "trainer/policy.safetensors", "trainer/state.json"}
    assert set(json.loads((folder / "manifest.json").read_text())) == files - {"manifest.json"}


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("trainer/policy.safetensors", flip, "its checksum differs"),
        ("trainer/policy.safetensors", cut, "bytes, not"),
        ("trainer/state.json", Path.unlink, "state.json is missing"),
        ("config.json", lambda file: file.write_text("{ "), "its checksum differs"),
        ("manifest.json", cut, ""),
        ("manifest.json", Path.unlink, "manifest.json can't be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, name, harm, words):
    before, damaged = save(tmp_path, 1), save(tmp_path, 2)
    harm(damaged / name)
    found, told = newest(tmp_path)
    if name == "manifest.json" and harm is cut:  # without its last newline it still says the same
        assert found == damaged and not told
    else:
        assert found == before
        assert len(told) == 1 and str(damaged) in told[0] and words in told[0]


def test_with_nothing_undamaged_there_is_nothing(tmp_path):
    assert newest(tmp_path) == (None, [])
    flip(save(tmp_path, 1) / "trainer/policy.safetensors")
    assert newest(tmp_path)[0] is None


def test_what_an_interrupted_save_left_is_no_checkpoint_and_goes_with_the_next(tmp_path):
    (left := tmp_path / "step-00000009.tmp").mkdir()
    folder = save(tmp_path, 1)
    assert checkpoints(tmp_path) == [folder] and newest(tmp_path) == (folder, [])
    prune(folder, 2, MESH)
    assert not left.exists()


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_the_last_ones_are_kept(tmp_path, keep):
    folders = [save(tmp_path, step) for step in (1, 2, 10, 100)]
    prune(folders[-1], keep, MESH)
    assert checkpoints(tmp_path) == folders[-keep:]


def test_a_damaged_later_checkpoint_does_not_push_out_the_good_ones(tmp_path):
    folders = [save(tmp_path, step) for step in (1, 2, 3, 9)]
    cut(folders[3] / "config.json")
    prune(folders[2], 2, MESH)  # the run went on from step 2, and has saved step 3
    assert checkpoints(tmp_path) == folders[1:3]


def test_saving_again_replaces(tmp_path):
    flip(save(tmp_path, 1) / "trainer/policy.safetensors")
    assert damage(save(tmp_path, 1)) == ""


@pytest.mark.parametrize("size", [0, 1000, 9000])  # in config.json, in the manifest, in the tensors
def test_a_full_disk_leaves_what_was_there(tmp_path, size):
    before = save(tmp_path, 1)
    with files_no_larger_than(size), pytest.raises(CheckpointError, match="step-00000002 could not be written"):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [before] and damage(before) == ""


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        save(tmp_path / "file", 1)


def test_a_runs_folder_stands_for_its_newest_checkpoint(tmp_path):
    folders = [str(save(tmp_path, step)) for step in (9, 10)]
    assert model_folder(str(tmp_path)) == folders[1]
    assert model_folder(folders[0]) == folders[0]
    assert model_folder(str(tmp_path / "none")) == str(tmp_path / "none")


def test_a_runs_folder_stands_for_the_newest_model_that_is_whole(tmp_path, capsys):
    folders = [save(tmp_path, step) for step in (8, 9, 10)]
    flip(folders[1] / "trainer/policy.safetensors")  # the model is whole all the same
    (folders[2] / "config.json").write_text("{ ")
    assert model_folder(str(tmp_path)) == model_folder(str(tmp_path)) == str(folders[1])
    told = capsys.readouterr().err
    assert told.count(f"{folders[2]} is damaged: config.json") == 1
    for folder in folders:
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="all of its 3 checkpoints are damaged"):
        model_folder(str(tmp_path))


def test_a_mistake_in_the_code_is_not_taken_for_a_full_disk(tmp_path):
    def broken(folder: str) -> None:
        raise KeyError("oops")

    with pytest.raises(KeyError):
        save_checkpoint(tmp_path / "step-00000001", MESH, broken, {}, {})
    assert not checkpoints(tmp_path)
