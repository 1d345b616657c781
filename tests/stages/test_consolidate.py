"""`tritium consolidate`: a checkpoint of any number of ranks becomes one model's folder."""

import json
from pathlib import Path

import pytest
import torch

import tritium
from tritium.core.checkpoint import Save
from tritium.model.config import ModelConfig
from tritium.model.hf import INDEX, export
from tritium.model.transformer import Transformer
from tritium.parallel.files import deal
from tritium.parallel.mesh import Mesh, init_mesh
from tritium.stages.cli import main

SHAPE = ModelConfig(32, 16, 24, 2, 2, 1, 8, max_positions=32)


def checkpoint(folder: str, tp: int = 1) -> None:
    """A run's one checkpoint, of a model that is cut over `tp` ranks."""
    mesh = init_mesh(tp=tp) if tp > 1 else Mesh.single()
    share, texts = export(Transformer(SHAPE, mesh).initialize(0))
    state = deal([("step", torch.zeros(100_000))], "trainer/policy", mesh)

    def write_small(folder: Path) -> None:
        for name, text in texts.items():
            (folder / name).write_text(text)
        (folder / "tokenizer.model").write_text("a tokenizer")

    Save(Path(folder) / "step-00000003", mesh, [share, state], write_small).seal()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("files", [1, 3])
def test_it_is_the_same_model_in_fewer_files(pool2, tmp_path, ranks, files):
    pool2.run(checkpoint, str(tmp_path), 2) if ranks == 2 else checkpoint(str(tmp_path))
    out, total = tmp_path / "out", sum(p.nbytes for p in Transformer(SHAPE).parameters())
    assert main(["consolidate", str(tmp_path), str(out), f"--gigabytes={total / (files - 0.5) / 1e9}"]) == 0
    names = {p.name for p in out.iterdir()}
    weights = {f"model-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)}
    weights = weights | {INDEX} if files > 1 else {"model.safetensors"}
    assert names == weights | {"config.json", "tokenizer.model"}
    if files > 1:
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == total and {*index["weight_map"].values(), INDEX} == weights
    loaded, wanted = tritium.load(str(out), dtype=torch.float32), Transformer(SHAPE).initialize(0)
    for (name, a), (_, b) in zip(loaded.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_source_without_a_model_and_one_that_is_damaged_are_sentences(tmp_path, capsys):
    checkpoint(str(tmp_path / "run"))
    (tmp_path / "run/step-00000003/config.json").write_text("{ ")
    for source, words in (("nothing", "nothing: there is no such folder"), ("run", "checkpoints are damaged")):
        assert main(["consolidate", str(tmp_path / source), str(tmp_path / "out")]) == 2
        shown = capsys.readouterr().err
        assert words in shown and "Traceback" not in shown
    (damaged,) = (tmp_path / "run").glob("step-*")
    assert main(["consolidate", str(damaged), str(tmp_path / "out")]) == 2
    assert "is damaged: config.json" in capsys.readouterr().err
    assert main(["consolidate", str(tmp_path), str(tmp_path / "out"), "--gigabytes=0"]) == 2
    assert "--gigabytes=0.0 must be positive" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["consolidate", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert "empty" in capsys.readouterr().err
    (tmp_path / "empty/adapter_config.json").write_text("{}")
    assert main(["consolidate", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert "is an adapter: `tritium surgery merge` makes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing is made of a mistake


def test_a_folder_with_a_model_is_left_alone(tmp_path, capsys):
    checkpoint(str(tmp_path))
    assert main(["consolidate", str(tmp_path), str(tmp_path / "step-00000003")]) == 2
    assert "holds a model already" in capsys.readouterr().err
