"""Deduplication: hashes against their definitions, and against a set's true similarity; planted duplicates."""

import importlib.util

import numpy as np
import pytest

from tritium.core.curate.dedup import winnow
from tritium.core.curate.minhash import Spill, banding, leaders, shingles, signatures, word_hashes
from tritium.stages import curate


def texts_of(rng, count, length=120, vocabulary=3000):
    return [" ".join(f"w{i}" for i in rng.integers(0, vocabulary, length)) for _ in range(count)]


def edited(rng, text, changes):
    words = text.split()
    for i in rng.choice(len(words), changes, replace=False):
        words[i] = f"new{rng.integers(1 << 30)}"
    return " ".join(words)


def jaccard(a, b, n):
    sets = [{tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in (a.split(), b.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_words_are_runs_of_letters_and_single_characters_without_spaces():
    texts = ["One two-THREE  four\n", "", "日本go語!", "é à", "🙂🙂", "...", "one"]
    hashes, owners, starts, ends = word_hashes([t.encode() for t in texts])
    words = [texts[o].encode()[a:b].decode() for o, a, b in zip(owners, starts, ends, strict=True)]
    assert words == ["One", "two", "THREE", "four", "日", "本", "go", "語", "é", "à", "🙂", "🙂", "one"]
    assert hashes[0] == hashes[-1] and len(set(hashes.tolist())) == 11


def test_shingles_are_sets_of_ngrams_whatever_the_company():
    texts = [b"a b c d", b"a b", b"", b"x y z a b c d"]
    found, at = shingles(texts, 3)
    assert at.tolist() == [0, 0, 1, 3, 3, 3, 3, 3]
    alone = [set(shingles([t], 3)[0].tolist()) for t in texts]
    assert [set(found[at == i].tolist()) for i in range(4)] == alone and len(alone[0] & alone[3]) == 2


@pytest.mark.parametrize("changes", [0, 3, 8, 20])
def test_signatures_estimate_jaccard_similarity(changes):
    rng = np.random.default_rng(changes)
    (text,) = texts_of(rng, 1, 400)
    other = edited(rng, text, changes)
    a, b = signatures([text.encode(), other.encode()], 5, 1024)
    true = jaccard(text, other, 5)
    assert (a == b).mean() == pytest.approx(true, abs=4 * (max(true * (1 - true), 0.01) / 1024) ** 0.5)


@pytest.mark.skipif(not importlib.util.find_spec("datasketch"), reason="datasketch is not installed")
def test_signatures_estimate_as_the_library_does():
    from datasketch import MinHash

    rng = np.random.default_rng(0)
    errors = []
    for text in texts_of(rng, 12):
        other = edited(rng, text, 6)
        theirs = [MinHash(128), MinHash(128)]
        for minhash, said in zip(theirs, (text, other), strict=True):
            words = said.split()
            minhash.update_batch([" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4)])
        a, b = signatures([text.encode(), other.encode()], 5, 128)
        true = jaccard(text, other, 5)
        errors.append(((a == b).mean() - true, theirs[0].jaccard(theirs[1]) - true))
    ours, library = np.abs(errors).mean(0)
    assert ours < max(1.5 * library, 0.05)


def test_banding_finds_pairs_at_the_threshold():
    for threshold in (0.5, 0.7, 0.9):
        bands, rows = banding(threshold, 128)
        assert bands * rows <= 128 and 1 - (1 - threshold**rows) ** bands >= 0.97


@pytest.mark.parametrize("memory", [100, 1 << 20])
def test_equal_keys_meet_whatever_the_memory(tmp_path, memory):
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 2**63, 300, np.uint64) * np.uint64(2)
    keys[200:] = keys[:100]
    spill = Spill(tmp_path, 300, memory)
    for at in range(0, 300, 70):
        spill.add(keys[at : at + 70], np.arange(at, min(at + 70, 300)))
    found = [sorted(values[run == r].tolist()) for values, run in spill.repeated() for r in np.unique(run)]
    assert sorted(found) == [[i, i + 200] for i in range(100)] and not list(tmp_path.iterdir())


def test_groups_are_led_by_their_first_member():
    assert leaders(np.array([[3, 5], [5, 9], [1, 3], [7, 8]]), 10).tolist() == [0, 1, 2, 1, 4, 1, 6, 7, 7, 1]
    chain = np.random.default_rng(0).permutation(np.stack([np.arange(999), np.arange(1, 1000)], 1))
    assert not leaders(chain, 1000).any() and leaders(chain[:0], 3).tolist() == [0, 1, 2]


def test_winnowing_keeps_one_of_every_window_of_a_text():
    hashes, owners = np.random.default_rng(0).integers(0, 99, 200, np.uint64), np.repeat([0, 1], 100)
    chosen = set(winnow(hashes, owners, 7).tolist())
    for text in (0, 100):
        assert all(chosen & set(range(text + i, text + i + 7)) for i in range(94))
    assert len(chosen) < 120 and len(winnow(hashes[:5], owners[:5], 7)) == 0


def curated(tmp_path, documents, **steps):
    import json

    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    tables = {"collect": {"sources": [str(tmp_path / "in.jsonl")]}} | steps
    config = curate.Config(steps=tables, out=str(tmp_path / "out"), workers=1, shard_mb=0.02, memory_mb=0.05)
    curate.train(config)
    (last,) = sorted((tmp_path / "out/steps").iterdir())[-1:]
    rows = [json.loads(line) for f in sorted(last.glob("*.jsonl")) for line in f.open()]
    dropped = [json.loads(line) for f in sorted(last.glob("*.dropped")) for line in f.open()]
    return [row["text"] for row in rows], dropped


def test_planted_near_duplicates_are_found_across_shards_and_nothing_else(tmp_path):
    rng = np.random.default_rng(7)
    base = texts_of(rng, 200)
    planted = [edited(rng, t, 2) for t in base[:60]]
    kept, dropped = curated(tmp_path, base + planted, near={"threshold": 0.7})
    true = [jaccard(a, b, 5) for a, b in zip(base, planted, strict=False)]
    assert min(true) > 0.8
    assert len(set(base) - set(kept)) == 0 and sum(t not in kept for t in planted) >= 57
    assert all(row["twin"] for row in dropped)


def test_the_first_of_exact_duplicates_stays(tmp_path):
    documents = ["One text here", "another", "one  TEXT here", "third", "another"] * 9
    kept, dropped = curated(tmp_path, documents, exact={})
    assert kept == ["One text here", "another", "third"] and len(dropped) == 42


@pytest.mark.parametrize("length", [20, 26, 60])
def test_repeated_passages_are_cut_where_they_come_again(tmp_path, length):
    rng = np.random.default_rng(length)
    own = texts_of(rng, 6, 80, 1 << 30)
    (passage,) = texts_of(rng, 1, length, 1 << 30)
    documents = [f"{a} {passage} {b}" for a, b in zip(own[::2], own[1::2], strict=True)]
    (kept, _) = curated(tmp_path, documents, passages={"passage": 20})
    assert kept[0] == documents[0]
    for text, a, b in zip(kept[1:], own[2::2], own[3::2], strict=True):
        left = text.removeprefix(a).removesuffix(b)
        assert text.startswith(a) and text.endswith(b) and len(left.split()) <= 2 * 9
    assert curated(tmp_path, [f"{a} {' '.join(passage.split()[:10])}" for a in own], passages={"passage": 20})[1] == []
