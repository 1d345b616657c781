import json

from tritium.bench.__main__ import main
from tritium.bench.rows import SCHEMA
from tritium.core.tokenizer import train_tokenizer


def test_rates_of_encoding_are_shown(tmp_path, capsys):
    train_tokenizer(["one two three\n" * 9], 266, tmp_path / "t")
    (text := tmp_path / "a.txt").write_text("one two three\n" * 500)
    assert main(["data", f"--tokenizers={tmp_path / 't'}", f"--texts={text}", f"--out={tmp_path}"]) in (0, 1)
    assert "encode_batch" in (tmp_path / "cpu/encoding.svg").read_text()
    out = capsys.readouterr().out
    assert "encode MB/s" in out and "the bar is 1 MB/s" in out
    assert main(["data", f"--tokenizers={tmp_path / 't'}"]) == 2


def test_the_factory_is_measured_and_finds_what_was_planted(tmp_path, capsys):
    code = main(["data", "--sizes=0.001,0.004", "--workers=1", f"--folder={tmp_path}", f"--out={tmp_path}"])
    out = capsys.readouterr().out
    assert code in (0, 1) and "filter" in out and "seconds grow" in out and "search: tritium" in out
    rows = [json.loads(line) for line in (tmp_path / "cpu/data.jsonl").read_text().splitlines()]
    assert [row["op"] for row in rows[:4]] == ["filter", "near", "near", "search"]
    assert all(row.keys() >= SCHEMA for row in rows)
    assert "every bar" in (said := (tmp_path / "cpu/data.md").read_text()) or "missed" in said
    assert "missed: recall" not in out and "false 0.00000" in out
