from tritium.bench.__main__ import main
from tritium.core.tokenizer import train_tokenizer


def test_rates_of_encoding_are_shown(tmp_path, capsys):
    train_tokenizer(["one two three\n" * 9], 266, tmp_path / "t")
    (text := tmp_path / "a.txt").write_text("one two three\n" * 500)
    assert main(["data", f"--tokenizers={tmp_path / 't'}", f"--texts={text}"]) in (0, 1)
    out = capsys.readouterr().out
    assert "encode MB/s" in out and "the bar is 1 MB/s" in out
    assert main(["data"]) == 2
