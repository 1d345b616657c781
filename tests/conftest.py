"""Fixtures shared by all tests."""

import importlib.util
import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

# By path: under --import-mode=importlib no test file can be imported by its name.
_spec = importlib.util.spec_from_file_location("workers", pathlib.Path(__file__).with_name("workers.py"))
workers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(workers)


@pytest.fixture(scope="session")
def pool2() -> Iterator["workers.Pool"]:
    """Two ranks on gloo; see workers.py."""
    with workers.Pool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool4() -> Iterator["workers.Pool"]:
    """Four ranks on gloo; see workers.py."""
    with workers.Pool(4) as pool:
        yield pool


@pytest.fixture
def quick(monkeypatch) -> Iterator[None]:
    """One thread, so that sums come in one order, and no measurement of the machine in each Trainer (0.3 s)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("tritium.core.trainer.matmul_rate", lambda *args, **kwargs: 1e9)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Tiny:
    """A folder with a tokenizer, a pretrained model of two layers, and one file of each kind of data."""

    folder: pathlib.Path
    model: str
    metrics: dict[str, float]  # of its pretraining

    def data(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """Made once: `pretrain` from raw text, with a tokenizer of its own."""
    from tritium.core.arithmetic import chat_answer, equation, problems
    from tritium.core.optim import OptimConfig
    from tritium.core.run import RunConfig
    from tritium.stages import pretrain

    folder = tmp_path_factory.mktemp("tiny")
    made = problems(seed=1, count=240)
    chats = [[p.question, chat_answer(p)] for p in made[:40]]
    chats += [["Hi", "Hello!", p.question, p.answer] for p in made[:8]]
    rows = {
        "text.jsonl": [{"text": equation(p)} for p in made],
        "chats.jsonl": [{"messages": turns(*texts)} for texts in chats],
        "pairs.jsonl": [{"prompt": p.question, "chosen": p.answer, "rejected": p.answer + "1"} for p in made[:40]],
        "rankings.jsonl": [{"prompt": p.question, "ranked": [p.answer, p.answer + "1", "no"]} for p in made[:40]],
        "problems.jsonl": [{"question": p.question, "answer": p.answer} for p in made[:6]],
    }
    for name, records in rows.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    shape = pretrain.ShapeConfig(2, 32, 64, heads=2, kv_heads=1, head_dim=16, context=96, init_std=0.02)
    config = pretrain.Config(vocab_size=340, model=shape, optim=OptimConfig(lr=1e-2))
    config.data.sources, config.data.bin_tokens, config.data.holdout = [str(folder / "text.jsonl")], 512, 0.1
    config.run = RunConfig(out=str(folder / "pretrain"), steps=12, dtype="fp32", eval_bins=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tritium.core.trainer.matmul_rate", lambda *args, **kwargs: 1e9)
        result = pretrain.train(config)
    return Tiny(folder, result.checkpoint, result.before | result.metrics | {"before": result.before["eval_loss"]})


def turns(*texts: str) -> list[dict]:
    """Messages of alternating roles, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
