from tritium.bench.__main__ import main
from tritium.core.tokenizer import train_tokenizer


def test_rates_of_encoding_are_shown(tmp_path, capsys):
    train_tokenizer(["one two three\n" * 9], 266, tmp_path / "t")
    (text := tmp_path / "a.txt").write_text("one two three\n" * 500)
    assert main(["data", f"--tokenizers={tmp_path / 't'}", f"--texts={text}"]) in (0, 1)
    out = capsys.readouterr().out
    assert "encode MB/s" in out and "the bar is 1 MB/s" in out
    assert main(["data", f"--tokenizers={tmp_path / 't'}"]) == 2


def test_the_factory_is_measured_and_finds_what_was_planted(tmp_path, capsys):
    code = main(["data", "--sizes=0.001,0.004", "--workers=1", f"--folder={tmp_path}"])
    out = capsys.readouterr().out
    assert code in (0, 1) and "filter" in out and "seconds grow" in out and "search: torch" in out
    assert "missed: recall" not in out and "false 0.00000" in out
