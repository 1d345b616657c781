"""The data factory as its users see it: pipelines, kills, bad input, and files that the stages read."""

import gzip
import json
import os
import shutil
import signal

import numpy as np
import pytest

from tritium.core.arithmetic import chat_answer, problems
from tritium.core.config import ConfigError, UserError, load
from tritium.core.files import Skipped, read_records
from tritium.core.formats import conversation, preference, ranking
from tritium.core.tokenizer import train_tokenizer
from tritium.stages import curate
from tritium.stages import run as run_recipe
from tritium.stages.cli import main


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def tree(folder):
    """Every file of a result but the scratch files and the cache: relative path → bytes."""
    files = (f for f in folder.rglob("*") if f.is_file() and "scratch" not in f.relative_to(folder).parts)
    files = (f for f in files if f.suffix != ".sqlite")
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def pipeline(tmp_path):
    """A small pipeline of all that needs no model; (its configuration, its folder)."""
    made = problems(seed=3, count=60)
    rows = [
        {"id": i, "question": p.question, "answer": f"{chat_answer(p)}\n#### {p.answer}"} for i, p in enumerate(made)
    ]
    maths = write(tmp_path / "maths.jsonl", rows + rows[:5])
    story = "Once upon a time a {0} met a {1} by the river and they talked about the {0} until the night fell over them"
    animals = ("fox", "hare", "wolf", "crow", "bear", "deer")
    texts = [{"text": ". ".join(story.format(a, b) for _ in range(2))} for a in animals for b in animals if a != b]
    text = write(tmp_path / "text.jsonl", texts + [{"text": texts[0]["text"] + " indeed"}])
    wrong = [
        {"question": p.question, "answer": p.answer, "m": {"solution": "it is 0", "is_correct": False}}
        for p in made[:9]
    ]
    tried = write(tmp_path / "tried.jsonl", wrong)
    tokenizer = tmp_path / "tokenizer"
    if not tokenizer.exists():
        train_tokenizer([row["text"] for row in texts] * 3, 300, tokenizer)
    steps = {
        "maths": {"do": "collect", "sources": [maths, tried], "source": "sums", "licence": "own"},
        "text": {"do": "collect", "sources": [text]},
        "clean": {},
        "filter": {"rules": [], "limits": {"min_words": 2}, "kinds": []},
        "exact": {},
        "near": {"kinds": ["text"], "threshold": 0.6},
        "passages": {"kinds": ["text"], "passage": 12},
        "reject": {"accept": {"regex('.')": 1.0}},
        "select": {"low": {"words": 2}, "count": 50, "by": "tag", "tag": "kind"},
        "pack": {"tokenizer": str(tokenizer)},
    }
    return steps, tmp_path / "out"


def run(steps, out, **settings):
    return curate.train(curate.Config(steps=steps, out=str(out), **({"workers": 1, "shard_mb": 0.004} | settings)))


def in_a_fork(work):
    """Run `work` in a process of its own; how it ended."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_killed_anywhere_and_started_again_the_files_are_byte_identical(tmp_path):
    steps, out = pipeline(tmp_path)
    run(steps, out)
    whole = tree(out)
    assert {"sft.jsonl", "pairs.jsonl", "curate.html", "pack/sums.tokens.npy"} <= whole.keys()
    assert sum(name.endswith(".meta.json") for name in whole) > 30  # several shards

    def killed_at(count):
        def work():
            real, calls = os.fsync, iter(range(count))

            def fsync(number):
                if next(calls, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(number)

            os.fsync = fsync
            run(steps, tmp_path / "again")

        return work

    for count in (1, 17, 60, 61):
        assert os.WTERMSIG(in_a_fork(killed_at(count))) == signal.SIGKILL
    run(steps, tmp_path / "again")
    again = tree(tmp_path / "again")
    for name in ("curate.html", "curate.json"):  # they name the folder
        again[name] = again[name].replace(str(tmp_path / "again").encode(), str(out).encode())
    assert again.keys() == whole.keys()
    assert [name for name in whole if again[name] != whole[name]] == []


def test_the_number_of_processes_changes_nothing_and_a_rerun_does_nothing(tmp_path, capsys):
    steps, out = pipeline(tmp_path)
    for heavy in ("reject", "pack"):  # other processes would load torch
        del steps[heavy]
    run(steps, out, workers=2)
    two = tree(out)
    capsys.readouterr()
    run(steps, out, workers=2)
    assert "shards to do" not in capsys.readouterr().err and tree(out) == two
    run(steps, tmp_path / "out1", workers=1)
    one = tree(tmp_path / "out1")
    assert [n for n in two if n.startswith("steps") and one[n] != two[n]] == []
    capsys.readouterr()
    steps["filter"]["limits"] = {"min_words": 20}  # a setting changed: this step and those after it, no more
    run(steps, out)
    err = capsys.readouterr().err
    assert "filter: 5 of 5" in err and "exact: " in err and "maths: " not in err and "clean: " not in err


def test_what_reject_wrote_goes_with_it_and_other_files_stay(tmp_path):
    steps, out = pipeline(tmp_path)
    del steps["pack"]
    names = ("sft.jsonl", "pairs.jsonl", "rankings.jsonl")
    run(steps, out)
    assert all((out / name).exists() for name in names)
    del steps["reject"]
    run(steps, out)
    assert not any((out / name).exists() for name in names)
    (out / "sft.jsonl").write_text("mine")
    run(steps, out)
    assert (out / "sft.jsonl").read_text() == "mine"


def test_the_stages_read_what_reject_writes(tmp_path):
    steps, out = pipeline(tmp_path)
    run(steps, out)
    rows = {
        name: [r for _, r in read_records(str(out / f"{name}.jsonl"), Skipped())]
        for name in ("sft", "pairs", "rankings")
    }
    assert all(conversation(row)[-1]["role"] == "assistant" for row in rows["sft"])
    assert len(rows["pairs"]) == len(rows["rankings"]) == 6  # of 9, what `select` has left
    prompt, chosen, rejected = preference(rows["pairs"][0])
    assert rejected == "it is 0" and chosen != rejected and len(ranking(rows["rankings"][0])[1]) == 2
    page = (out / "curate.html").read_text()
    assert "an exact duplicate" in page and "resembles text:" in page and "sums" in page


def test_every_document_says_where_it_comes_from(tmp_path):
    steps, out = pipeline(tmp_path)
    run(steps, out)
    (last,) = sorted((out / "steps").iterdir())[-1:]
    documents = [json.loads(line) for f in sorted(last.glob("*.jsonl")) for line in f.read_text().splitlines()]
    assert len({d["id"] for d in documents}) == len(documents) == 50
    for document in documents:
        assert [p["step"] for p in document["provenance"]][-2:] == ["select", "pack"]
        assert document["licence"] in ("own", "unknown") and document["source"] in ("sums", "text")


def test_pretrain_reads_the_packed_shards(tmp_path):
    from tritium.core.data import DataConfig, token_shard
    from tritium.core.files import DataError
    from tritium.core.tokenizer import Tokenizer

    steps, out = pipeline(tmp_path)
    run(steps, out)
    tokenizer, skipped = Tokenizer.load(tmp_path / "tokenizer"), Skipped()
    tokens, starts = token_shard(str(out / "pack/text.tokens.npy"), tokenizer, "", skipped, DataConfig())
    ends = [*starts[1:], len(tokens)]
    texts = [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
    assert len(texts) > 5 and all("met a" in text for text in texts)
    train_tokenizer(["other words here"] * 9, 270, tmp_path / "other")
    with pytest.raises(DataError, match="another tokenizer"):
        token_shard(str(out / "pack/text.tokens.npy"), Tokenizer.load(tmp_path / "other"), "", skipped, DataConfig())


def test_bad_input_is_counted_and_takes_nothing_with_it(tmp_path):
    good = [{"id": 7, "text": f"line {i} is a good one"} for i in range(200)]
    lines = [json.dumps(row).encode() for row in good]
    lines[3] = b'{"text": "caf\xe9 au lait"}'  # cp1252
    lines[4] = b"{broken"
    lines[5] = b'{"text": "' + b"x" * 300_000 + b'"}'
    lines[6] = b'["a list"]'
    lines[8] = b'{"text": "\\ud800 half"}'
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(lines))
    whole = gzip.compress(b"\n".join(json.dumps({"text": f"{i} {os.urandom(20).hex()}"}).encode() for i in range(2000)))
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "wide.jsonl").write_bytes(
        "\n".join(json.dumps(r, ensure_ascii=False) for r in good[:9]).encode("utf-16")
    )
    (tmp_path / "list.json").write_text(json.dumps(good[:8])[:-20])
    (tmp_path / "empty.jsonl").write_text("")
    collect = {"sources": [str(tmp_path / "*.json*")], "max_line_mb": 0.2}
    result = run({"collect": collect}, tmp_path / "out", shard_mb=0.002)
    (step,) = json.loads((tmp_path / "out/curate.json").read_text())["steps"]
    dropped = {reason: n for reason, n in step["dropped"].items()}
    assert dropped.pop("a damaged file: what follows is lost") == 2
    assert dropped.pop("malformed JSON") in (1, 2)  # and the torn file's last line
    assert dropped == {"a line longer than 0.2 MB": 1, "a record that is not a JSON object": 1,
                       "a text that is not valid Unicode": 1}  # fmt: skip
    assert step["notes"]["lines that are not UTF-8, read as cp1252"] == 1
    assert step["notes"]["ids that come twice in a shard"] > 100
    texts = [json.loads(line)["text"] for f in (tmp_path / "out/steps/00-collect").glob("*.jsonl") for line in f.open()]
    assert "café au lait" in texts and sum(t.startswith("line") for t in texts) == 195 + 9 + 7
    assert result.metrics["kept"] == len(texts) > 700
    page = (tmp_path / "out/curate.html").read_text()
    assert "{broken" in page and "torn.jsonl.gz" in page


def test_files_of_one_name_get_names_of_their_own_and_folders_are_passed_over(tmp_path):
    for place in ("en/train", "en/train-2", "fr/train"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{place}.jsonl", [{"text": f"said in {place}"}])
    (tmp_path / "en/folder.jsonl").mkdir()
    result = run({"collect": {"sources": [str(tmp_path / "*/*.jsonl")]}}, tmp_path / "out")
    names = [f.name for f in (tmp_path / "out/steps/00-collect").glob("*.jsonl")]
    assert sorted(names) == ["train-0000.jsonl", "train-2-0000.jsonl", "train-3-0000.jsonl"]
    assert result.metrics["kept"] == 3


def test_many_small_texts_share_shards_and_keep_their_names(tmp_path):
    (folder := tmp_path / "notes").mkdir()
    for i in range(300):
        (folder / f"{i:03d}.txt").write_bytes(f"note {i}, caf\xe9".encode("cp1252"))
    (folder / "page.html").write_text("<p>a <b>page</b></p>")
    (folder / "long.txt").write_text("a line of it\n" * 3000)
    (folder / "wide.txt").write_text("wide", encoding="utf-16")
    collect = {"collect": {"sources": [str(folder / "*")]}}
    result = run(collect, tmp_path / "out", shard_mb=0.01)
    shards = sorted((tmp_path / "out/steps/00-collect").glob("*.jsonl"))
    documents = {d.get("own_id", "")[-7:]: d for f in shards for d in map(json.loads, f.open(encoding="utf-8"))}
    assert len(shards) < 20 and result.metrics["kept"] == 301 + 5  # the long one in four pieces, and the wide one
    assert documents["007.txt"]["text"] == "note 7, café" and documents["007.txt"]["source"] == "notes"
    assert documents["ge.html"]["text"] == "a page"
    before = {f.name: f.read_bytes() for f in shards}
    run(collect, tmp_path / "out", shard_mb=0.01)
    assert {f.name: f.read_bytes() for f in shards} == before


def test_plain_texts_that_are_not_utf8_are_read_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("un café\n".encode("cp1252"))
    (tmp_path / "b.html").write_bytes("<p>un thé</p>".encode("cp1252"))
    lines = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(2))
    (tmp_path / "c.json").write_text(lines)  # lines under the name of a list
    run({"collect": {"sources": [str(tmp_path / "*.*")]}}, tmp_path / "out")
    (step,) = json.loads((tmp_path / "out/curate.json").read_text())["steps"]
    texts = {json.loads(x)["text"] for f in (tmp_path / "out/steps/00-collect").glob("*.jsonl") for x in f.open()}
    assert texts == {"un café", "un thé", "row 0", "row 1"} and not step["dropped"]
    assert step["notes"] == {"lines that are not UTF-8, read as cp1252": 2}


def test_json_over_several_lines_is_read_as_what_it_is(tmp_path):
    rows = [{"text": f"row {i}", "more": [{"a": 1}, {}]} for i in range(3)]
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=2))
    (tmp_path / "list.json").write_text(json.dumps(rows[1:2]))
    with gzip.open(tmp_path / "several.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row, indent=1) for row in rows[2:] * 2))
    (tmp_path / "cut.json").write_text(json.dumps(rows[0], indent=2)[:-9])
    run({"collect": {"sources": [str(tmp_path / "*.json*")]}}, tmp_path / "out")
    (step,) = json.loads((tmp_path / "out/curate.json").read_text())["steps"]
    texts = [json.loads(x)["text"] for f in (tmp_path / "out/steps/00-collect").glob("*.jsonl") for x in f.open()]
    assert sorted(texts) == ["row 0", "row 1", "row 2", "row 2"]
    assert step["dropped"] == {"a damaged file: what follows is lost": 1}
    assert [record["text"] for _, record in read_records(str(tmp_path / "one.json"), Skipped())] == ["row 0"]


def test_json_in_utf16_is_read_whether_packed_a_list_or_of_a_long_name(tmp_path):
    rows = [{"text": f"größe {i}"} for i in range(6)]
    listed = json.dumps(rows[:2], ensure_ascii=False, indent=1).encode("utf-16")  # as PowerShell writes it
    (tmp_path / "list.json").write_bytes(listed)
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps(rows[2:4]).encode("utf-16")))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[4:])
    (tmp_path / f"{'n' * 240}.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-16")))
    run({"collect": {"sources": [str(tmp_path / "*.json*")]}}, tmp_path / "out")
    texts = [json.loads(x)["text"] for f in (tmp_path / "out/steps/00-collect").glob("*.jsonl") for x in f.open()]
    assert sorted(texts) == [row["text"] for row in rows]


@pytest.mark.parametrize(
    "cut", ['{"text": "cut", "id": 1,', '{"messages": [{"role": "user", "content": "cut"},', '{"a": {']
)
def test_a_first_line_that_is_cut_off_takes_no_other_with_it(tmp_path, cut):
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3))
    (tmp_path / "a.jsonl").write_text(f"{cut}\n{rows}")
    run({"collect": {"sources": [str(tmp_path / "a.jsonl")]}}, tmp_path / "out")
    (step,) = json.loads((tmp_path / "out/curate.json").read_text())["steps"]
    assert step["rows"] == 3 and step["dropped"] == {"malformed JSON": 1}
    assert cut[:10] in step["samples"]["malformed JSON"][0]["text"]


def test_only_the_first_records_of_a_file_are_taken(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", [{"text": f"row {i} {k}"} for k in range(5)]) for i in range(2)]
    run({"collect": {"sources": files, "limit": 2}}, tmp_path / "out")
    texts = [json.loads(x)["text"] for f in (tmp_path / "out/steps/00-collect").glob("*.jsonl") for x in f.open()]
    assert sorted(texts) == ["row 0 0", "row 0 1", "row 1 0", "row 1 1"]


def test_a_second_collect_counts_what_was_there_before_it(tmp_path):
    steps = {f"read{i}": {"do": "collect", "sources": [write(tmp_path / f"{i}.jsonl", [{"text": "four"}] * (i + 1))]}
             for i in range(3)}  # fmt: skip
    result = run(steps, tmp_path / "out")
    told = json.loads((tmp_path / "out/curate.json").read_text())["steps"]
    assert [(step["read"], step["rows"], step["characters"]) for step in told] == [(1, 1, 4), (2, 3, 12), (3, 6, 24)]
    assert result.metrics == {"collected": 6.0, "kept": 6.0}


def test_lines_of_another_encoding_are_read_in_it_where_it_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "plain"}\n' + '{"text": "日本語"}\n'.encode("shift_jis"))
    collect = {"sources": [str(tmp_path / "a.jsonl")], "encoding": "shift_jis"}
    run({"collect": collect}, tmp_path / "out")
    lines = (tmp_path / "out/steps/00-collect/a-0000.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["plain", "日本語"]
    with pytest.raises(ConfigError, match="encoding='latin-99'"):
        run({"collect": collect | {"encoding": "latin-99"}}, tmp_path / "out")


def test_a_long_text_is_read_in_pieces_and_its_endless_line_left_out(tmp_path):
    paragraphs = [f"Paragraph {i} of a long text.\nIts second line.\n" for i in range(300)]
    paragraphs[100] = "x" * 60_000
    (tmp_path / "a.txt").write_text("\n".join(paragraphs))
    collect = {"sources": [str(tmp_path / "a.txt")], "characters": 200, "max_line_mb": 0.05}
    run({"collect": collect}, tmp_path / "out", shard_mb=0.005)
    (step,) = json.loads((tmp_path / "out/curate.json").read_text())["steps"]
    files = sorted((tmp_path / "out/steps/00-collect").glob("*.jsonl"))
    documents = [json.loads(line) for file in files for line in file.open()]
    assert len(files) > 5 and step["dropped"] == {"a line longer than 0.05 MB": 1}
    lines = [line for d in documents for line in d["text"].splitlines() if line]
    assert lines == [line for i, p in enumerate(paragraphs) if i != 100 for line in p.splitlines()]
    assert max(len(d["text"]) for d in documents) < 400 and len({d["id"] for d in documents}) == len(documents)


def test_another_seed_and_another_list_of_words_make_a_step_anew(tmp_path):
    rows = [{"instruction": f"Ask {i}", "output": f"word{i} said"} for i in range(40)]
    (tmp_path / "bad.txt").write_text("word3\n")
    words = {"accept": {f"words('{tmp_path}/bad.txt')": 1.0}}
    steps = {"collect": {"sources": [write(tmp_path / "a.jsonl", rows)]}, "reject": words, "select": {"count": 9}}
    kept = []
    for seed in (0, 1):
        run(steps, tmp_path / "out", seed=seed)
        kept.append((tmp_path / "out/steps/02-select/a-0000.jsonl").read_text())
    assert kept[0] != kept[1]
    (tmp_path / "bad.txt").write_text("word1\nword2\n")
    run(steps | {"select": {}}, tmp_path / "out")
    assert '"word3 said"' in (said := (tmp_path / "out/sft.jsonl").read_text()) and '"word1 said"' not in said


def test_a_shard_without_documents_and_sources_of_one_name_pack(tmp_path, monkeypatch):
    monkeypatch.setattr("tritium.core.curate.pack.encode_documents",
                        lambda texts, *_: [np.array([70_000] * len(text), np.uint32) for text in texts])  # fmt: skip
    train_tokenizer(["other words here"] * 9, 265, tmp_path / "tokenizer")
    steps = {"none": {"do": "collect", "sources": [write(tmp_path / "a.jsonl", [])]}}
    for i, source in enumerate(("the web", "the/web")):
        file = write(tmp_path / f"b{i}.jsonl", [{"text": "x" * (3 + i)}])
        steps[f"read{i}"] = {"do": "collect", "sources": [file], "source": source}
    run(steps | {"pack": {"tokenizer": str(tmp_path / "tokenizer")}}, tmp_path / "out")
    packed, starts = (np.load(tmp_path / f"out/pack/the-web.{name}.npy") for name in ("tokens", "starts"))
    assert packed.tolist() == [70_000] * 7 and starts.tolist() == [0, 3]
    shutil.rmtree(tmp_path / "out/scratch")  # who needs room may delete it
    run(steps | {"pack": {"tokenizer": str(tmp_path / "tokenizer")}}, tmp_path / "out")
    steps["read0"]["source"] = "another"  # of the others, what was packed stays no longer than they do
    steps.pop("read1")
    run(steps | {"pack": {"tokenizer": str(tmp_path / "tokenizer")}}, tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out/pack").iterdir()) == [
        f"another.{kind}" for kind in ("json", "starts.npy", "tokens.npy")
    ]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({}, "give at least"),
        ({"colect": {}}, "did you mean collect"),
        ({"collect": {"sources": ["nowhere-*.jsonl"]}}, "does not exist"),
        ({"collect": {"source": ["x"]}}, r"\[steps.collect\].*source"),
        ({"collect": {"sources": ["*"], "encoding": "rot13"}}, "not a text encoding"),
        ({"collect": {"limit": -1}}, r"\[steps.collect\]: limit=-1"),
        ({"filter": {}}, "must be a collect"),
        ({"collect": {}, "filter": {"limits": {"min_word": 1}}}, "did you mean min_words"),
        ({"collect": {}, "near": {"threshold": 0}}, r"\[steps.near\]: threshold"),
        ({"collect": {}, "decontaminate": {"threshold": 95}}, r"\[steps.decontaminate\]: threshold=95"),
        ({"collect": {}, "reject": {"score": "maths"}}, "did you mean math"),
        ({"collect": {}, "pack": {}}, "tokenizer must be given"),
        ({"collect": {}, "select": {"mixture": {"a": 0}}}, "and not all 0"),
    ],
)
def test_a_wrong_pipeline_is_told_before_anything_runs(tmp_path, steps, message):
    if steps.get("collect") == {}:
        steps = steps | {"collect": {"sources": [write(tmp_path / "a.jsonl", [{"text": "x"}])]}}
    with pytest.raises(UserError, match=message):
        run(steps, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("py3langid", {"do": "clean", "identify": "py3langid"}),
        ("math_verify", {"do": "reject", "verify": "math_verify"}),
        ("faiss", {"do": "semantic", "model": "{here}", "engine": "faiss"}),
        ("transformers", {"do": "semantic", "model": "{here}"}),
    ],
)
def test_a_library_that_is_not_there_is_named_before_anything_runs(tmp_path, monkeypatch, name, table):
    monkeypatch.setattr("tritium.core.curate.step.find_spec", lambda library: None if library == name else True)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    table = {key: value.format(here=tmp_path) for key, value in table.items()}
    steps = {"collect": {"sources": [write(tmp_path / "a.jsonl", [{"text": "x"}])]}, "it": table}
    with pytest.raises(ConfigError, match=rf"\[steps.it\]: .*{name}.*pip install \"tritium\[data\]"):
        run(steps, tmp_path / "out")


def test_the_command_reads_a_toml_file_and_writes_one_back(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", [{"text": "some words of a text"}])
    (tmp_path / "p.toml").write_text(f'out = "{tmp_path}/o"\n[steps.in]\ndo = "collect"\nsources = ["{source}"]\n'
                                     '[steps.filter]\nrules = []\n[steps.filter.limits]\nmin_words = 3\n')  # fmt: skip
    assert main(["curate", "--config", str(tmp_path / "p.toml"), "--workers=1"]) == 0
    shown = capsys.readouterr().err
    again = shown[: shown.index("in: 1 of 1")].partition("\n")[2]
    (tmp_path / "q.toml").write_text(again)
    arguments = ["--config", str(tmp_path / "q.toml")], ["--config", str(tmp_path / "p.toml"), "--workers=1"]
    assert load(curate.Config, arguments[0], "", "") == load(curate.Config, arguments[1], "", "")
    with pytest.raises(ConfigError, match="steps"):
        load(curate.Config, ["--steps=3"], "", "")


def test_the_demo_recipe_is_a_valid_one_of_all_seven_groups(tmp_path):
    recipe = run_recipe.read_recipe("curate-demo")
    run_recipe.check(recipe, tmp_path)
    tables = recipe["stages"]["curate"]["config"]["steps"]
    used = {table.get("do", name) for name, table in tables.items()}
    assert used >= {"collect", "filter", "near", "semantic", "decontaminate", "select", "distil", "reject", "pack"}
