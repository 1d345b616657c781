"""Checkpoints: whole or not there, found again, and never trusted when damaged."""

import json
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tritium.core.checkpoint import (
    CheckpointError,
    Save,
    checkpoints,
    damage,
    latest,
    model_folder,
    prune,
    read_state,
)
from tritium.parallel.files import deal, open_tensors
from tritium.parallel.mesh import Mesh, init_mesh

MESH = Mesh.single()


def tensors(step: int) -> dict[str, torch.Tensor]:
    made = {f"master.{name}": torch.full((40, 50), float(step + i)) for i, name in enumerate("wv")}
    return made | {"step": torch.tensor(float(step))}


def begin(run: Path, step: int, mesh: Mesh = MESH) -> Save:
    def write_small(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "trainer/state.json").write_text(json.dumps({"step": step}))

    shares = [deal(tensors(step).items(), "trainer/policy", mesh)]
    return Save(run / f"step-{step:08d}", mesh, shares, write_small)


def save(run: Path, step: int, mesh: Mesh = MESH) -> Path:
    begun = begin(run, step, mesh)
    begun.seal()
    return begun.folder


def assert_holds(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    with open_tensors(folder, "trainer/policy") as found:
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k], v) for k, v in wanted.items())


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
    assert_holds(folder, tensors(3))
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


def test_a_copy_by_another_name_is_the_users(tmp_path):
    folders = [save(tmp_path, step) for step in (1, 2)]
    best = shutil.copytree(folders[0], tmp_path / "step-00000001-best")
    assert newest(tmp_path) == (folders[1], [])
    prune(save(tmp_path, 3), 1, MESH)
    assert damage(best) == ""


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
    def broken(folder: Path) -> None:
        raise KeyError("oops")

    with pytest.raises(KeyError):
        Save(tmp_path / "step-00000001", MESH, [], broken).seal()
    assert not list(tmp_path.iterdir())


def test_what_changes_after_a_save_has_begun_is_not_in_it(tmp_path):
    live = tensors(1)
    share = deal(live.items(), "trainer/policy", MESH)
    for tensor in live.values():
        tensor.zero_()
    begun = Save(tmp_path / "step-00000001", MESH, [share], lambda folder: None)
    begun.thread.join()
    assert begun.written and not checkpoints(tmp_path)  # it has no name before it is sealed
    begun.seal()
    assert_holds(begun.folder, tensors(1))


# ---------------------------------------------------------------------------------------------- several ranks


def save_on_ranks(run: str, step: int, full_disk: int | None = None) -> str:
    """Save on a mesh, where the disk of rank `full_disk` is full; the error."""
    mesh = init_mesh()
    with files_no_larger_than(1000 if mesh.rank == full_disk else resource.RLIM_INFINITY):
        try:
            save(Path(run), step, mesh)
        except CheckpointError as error:
            return str(error)
    return ""


def newest_on_ranks(run: str) -> tuple[str, list[str]]:
    told: list[str] = []
    return str(latest(Path(run), init_mesh(), told.append)), told


def test_each_rank_writes_its_share_and_one_process_reads_all(pool2, tmp_path):
    assert pool2.run(save_on_ranks, str(tmp_path), 3) == ["", ""]
    (folder,) = checkpoints(tmp_path)
    names = [f"policy-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(p.name for p in folder.glob("trainer/*")) == [*names, "state.json"]
    sizes = [(folder / "trainer" / name).stat().st_size for name in names]
    assert max(sizes) < 1.1 * min(sizes)
    assert damage(folder) == ""
    assert set(json.loads((folder / "manifest.json").read_text())) >= {f"trainer/{name}" for name in names}
    assert_holds(folder, tensors(3))


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize("part", [1, 2])
def test_damage_to_one_ranks_file_is_seen_by_all(pool2, tmp_path, harm, part):
    before, damaged = save(tmp_path, 1), tmp_path / "step-00000002"
    assert pool2.run(save_on_ranks, str(tmp_path), 2) == ["", ""]
    name = f"trainer/policy-0000{part}-of-00002.safetensors"
    harm(damaged / name)
    for found, told in pool2.run(newest_on_ranks, str(tmp_path)):
        assert found == str(before) and len(told) == 1 and f"step-00000002 is damaged: {name}" in told[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_ranks_full_disk_is_told_on_all_and_leaves_what_was_there(pool2, tmp_path, rank):
    before = save(tmp_path, 1)
    for error in pool2.run(save_on_ranks, str(tmp_path), 2, rank):
        assert "step-00000002 could not be written" in error and ("(rank 1)" in error) == (rank == 1)
    assert list(tmp_path.iterdir()) == [before] and damage(before) == ""


def test_any_bit_that_flips_in_a_manifest_is_damage_or_changes_nothing(tmp_path):
    """Not a crash: a name, a size, a key or a bracket may be hit."""
    folder = save(tmp_path, 1)
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    for place in range(len(content)):
        for bit in (1, 4, 64):
            manifest.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            assert damage(folder) or json.loads(manifest.read_bytes()) == json.loads(content), (place, bit)


def test_a_file_that_the_disk_will_not_give_back_is_damage(tmp_path, monkeypatch):
    folder = save(tmp_path, 1)

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("tritium.core.checkpoint.digest", broken)
    assert "can't be read" in damage(folder)
