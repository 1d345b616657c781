"""A pruned vocabulary: the same text, the same tokens under other numbers, and every other text still survives."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import tritium
from tritium.core.code import fill_in_the_middle, hole_markers
from tritium.core.config import UserError
from tritium.core.tokenizer import Tokenizer
from tritium.core.tokenizer.pruning import prune
from tritium.stages import cli

DATA = Path(tritium.__file__).parent.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="needs the shared data beside the checkout")
TEXT = (DATA / "text" / "tinystories.txt").read_text()[:20_000] if DATA.exists() else ""
ODD = "Ünïcode 你好 🙂 <|im_end|> 12345 def f(x):\n\treturn x  # 日本"


@pytest.mark.parametrize("name", ["qwen3-hf", "deepseek", "mistral-v3"])
def test_text_keeps_its_tokens_and_everything_survives(tmp_path, name):
    whole = Tokenizer.load(DATA / "tokenizers" / name)
    ids = whole.encode(TEXT)
    pruned, kept = prune(whole, ids)
    pruned.save(tmp_path)
    pruned = Tokenizer.load(tmp_path)
    assert pruned.vocab_size == len(kept) < whole.vocab_size / 3
    assert [kept[i] for i in pruned.encode(TEXT)] == ids
    assert pruned.decode(pruned.encode(ODD)) == ODD == whole.decode(whole.encode(ODD))
    assert kept[pruned.eos_id] == whole.eos_id
    assert [kept[i] for i in pruned.encode("<|im_end|>", special=True)] == whole.encode("<|im_end|>", special=True) or (
        name != "qwen3-hf"
    )
    if (tmp_path / "tokenizer.json").exists():  # and Hugging Face's library reads it
        theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert theirs.encode(ODD, add_special_tokens=False).ids == pruned.encode(ODD, special=True)


def test_what_can_not_be_pruned_is_said():
    with pytest.raises(
        UserError, match="only SentencePiece's tokenizer.model and Hugging Face's tokenizer.json can be pruned"
    ):
        prune(Tokenizer.load(DATA / "tokenizers" / "llama3"), [1])


def test_a_model_and_its_tokenizer_are_pruned_together(tmp_path):
    source, text = str(DATA / "models" / "stories260k"), tmp_path / "text.txt"
    text.write_text(TEXT[:2000])
    assert cli.main(["surgery", "vocabulary", source, str(tmp_path / "out"), f"--text={text}"]) == 0
    old, new = (tritium.load(folder, dtype=torch.float32) for folder in (source, str(tmp_path / "out")))
    before, after = Tokenizer.load(source), Tokenizer.load(tmp_path / "out")
    assert new.config.vocab_size == after.vocab_size < before.vocab_size
    ids, pruned = before.encode(TEXT[:300]), after.encode(TEXT[:300])
    logits, wanted = new.logits(torch.tensor(pruned)), old.logits(torch.tensor(ids))
    own = [before.special_id(after.piece(i)) for i in range(after.vocab_size)]
    assert [own[i] for i in pruned] == ids
    torch.testing.assert_close(logits, wanted[:, own], rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == after.eos_id


def test_deepseek_coder_marks_the_hole_where_the_suffix_comes():
    tokenizer = Tokenizer.load(DATA / "tokenizers" / "deepseek")
    ids = fill_in_the_middle(tokenizer, "def f():\n    pass", hole_markers(tokenizer), np.random.default_rng(0), False)
    form = r"<｜fim▁begin｜>(.*)<｜fim▁hole｜>(.*)<｜fim▁end｜>(.*)"  # arXiv 2401.14196, section 3.1.2
    prefix, suffix, middle = re.fullmatch(form, tokenizer.decode(ids, keep_special=True), re.DOTALL).groups()
    assert prefix + middle + suffix == "def f():\n    pass"
