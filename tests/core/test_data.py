"""From files to bins: what is trained on, how often, in which order, on which rank."""

import json
import resource
from collections import Counter

import numpy as np
import pytest

from tritium.core.batch import Document
from tritium.core.config import ConfigError, UserError
from tritium.core.data import (
    Bins,
    DataConfig,
    Examples,
    Windows,
    fit,
    parse_sources,
    record_sources,
    text_sources,
)
from tritium.core.files import DataError, Skipped
from tritium.core.formats import RecordError
from tritium.core.groups import conversation_group, preference_group, ranking_group
from tritium.core.output import write_array
from tritium.core.schedule import BatchRamp, ScheduleConfig
from tritium.core.tokenizer import Tokenizer
from tritium.parallel.mesh import Mesh
from tritium.stages.pretrain import replay_weights


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer.load(tiny.model)


def examples(first: int, sizes: list[int], difficulty: list[float] | None = None) -> Examples:
    """Groups of one document; token ids say which: group i is [first + i] · sizes[i]."""
    groups = [[Document(np.full(n, first + i, np.int32), np.ones(n, np.float32))] for i, n in enumerate(sizes)]
    return Examples(groups, None if difficulty is None else np.array(difficulty))


def bins_of(sources, weights=None, mesh=None, seed=0, **config) -> Bins:
    settings = DataConfig(**{"bin_tokens": 64, **config})
    return Bins(sources, weights or [1.0] * len(sources), settings, mesh or Mesh.single(), seed)


def seen(bins: Bins, epoch: int = 0) -> Counter:
    """How often an epoch passes through each item."""
    return Counter(item for members in bins.epoch_bins(epoch) for item in members)


def unpacked(batch) -> list[list[int]]:
    """The tokens of each document of a batch, without the fillers at its end."""
    cu = batch.cu_seqlens[: batch.sequences + 1].tolist()
    return [batch.tokens[start:end].tolist() for start, end in zip(cu[:-1], cu[1:], strict=True)]


def documents(batch) -> list[int]:
    """The first token of each document of a batch."""
    return [ids[0] for ids in unpacked(batch)]


SIZES = np.random.default_rng(0).integers(2, 30, 60).tolist()

# ---------------------------------------------------------------------------------------------- order


def test_a_step_is_a_function_of_the_seed_and_the_step_alone():
    straight, jumping = bins_of([examples(0, SIZES)]), bins_of([examples(0, SIZES)])
    steps = 3 * len(straight.epoch_bins(0))
    in_order = [straight.step(s)[0].tokens.tolist() for s in range(steps)]
    for s in np.random.default_rng(1).permutation(steps):  # as a resumed run would: without the steps before
        assert jumping.step(int(s))[0].tokens.tolist() == in_order[s]
    assert bins_of([examples(0, SIZES)], seed=1).step(0)[0].tokens.tolist() != in_order[0]


def test_epochs_follow_one_another_each_in_its_own_order():
    bins = bins_of([examples(0, SIZES)])
    at, firsts = 0, []
    for epoch in range(4):
        planned = bins.plan_epoch(epoch)
        found = [documents(bins.bin(at + i)) for i in range(len(planned))]
        assert found == [[item for _, item in members] for members in planned]
        assert sorted(sum(found, [])) == list(range(60))
        firsts.append(found[0])
        at += len(planned)
    assert len({tuple(first) for first in firsts}) == 4


@pytest.mark.parametrize(("dp", "bins_per_step"), [(2, 4), (2, 3), (4, 4)])
def test_ranks_share_what_one_process_would_take(dp, bins_per_step):
    alone = bins_of([examples(0, SIZES)], bins_per_step=bins_per_step)
    ranks = [
        bins_of([examples(0, SIZES)], bins_per_step=bins_per_step, mesh=Mesh(rank=r, world_size=dp, dp=dp, dp_rank=r))
        for r in range(dp)
    ]
    for step in range(5):
        shares = [[b.tokens.tolist() for b in rank.step(step)] for rank in ranks]
        together = [shares[i % dp][i // dp] for i in range(bins_per_step)]
        assert together == [b.tokens.tolist() for b in alone.step(step)]
        assert sum(map(len, shares)) == bins_per_step


@pytest.mark.parametrize("ramp", [{}, {"batch_start": 0.25, "batch_ramp": 0.5}, {"batch_start": 0.1, "batch_ramp": 7},
                                  {"batch_start": 0.3, "batch_ramp": 500}])  # fmt: skip
@pytest.mark.parametrize("epochs", [0.1, 1.0, 2.5])
def test_epochs_are_passes_over_the_data_also_while_the_batch_grows(epochs, ramp):
    bins, schedule = bins_of([examples(0, [10] * 97)], bins_per_step=8, bin_tokens=10), ScheduleConfig(**ramp)

    def taken(steps: int) -> int:
        growing = BatchRamp(schedule, 8, 1, steps, {}) if ramp else None
        return sum(len(bins.step(step, growing)) for step in range(steps))

    steps = bins.steps_in(epochs, schedule)
    assert taken(steps) >= epochs * 97 and (steps == 1 or taken(steps - 1) < epochs * 97)


def test_fewer_bins_than_ranks_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"bins_per_step=2 leaves some of the 4 .* set data.bins_per_step=4"):
        bins_of([examples(0, SIZES)], bins_per_step=2, mesh=Mesh(world_size=4, dp=4))


def test_a_curriculum_goes_from_easy_to_hard_with_ties_shuffled():
    levels = np.random.default_rng(2).integers(0, 5, 60).tolist()
    for seed in range(2):
        bins = bins_of([examples(0, [10] * 60, levels)], seed=seed, bin_tokens=10)
        order = [item for members in bins.epoch_bins(0) for _, item in members]
        assert [levels[i] for i in order] == sorted(levels)
        assert order != sorted(range(60), key=lambda i: levels[i])


# ---------------------------------------------------------------------------------------------- mixtures


def test_an_epoch_passes_through_each_source_by_its_weight():
    sources = [examples(0, [5] * 40), examples(100, [5] * 30), examples(200, [5] * 20)]
    bins = bins_of(sources, [1.0, 2.0, 0.5])
    for epoch in range(2):
        counts = seen(bins, epoch)
        assert [sum(n for (s, _), n in counts.items() if s == source) for source in range(3)] == [40, 60, 10]
        assert all(n == {0: 1, 1: 2, 2: 1}[source] for (source, _), n in counts.items())
    halves = [{i for s, i in seen(bins, epoch) if s == 2} for epoch in range(2)]
    assert halves[0] != halves[1]


def test_a_weight_with_a_fraction():
    counts = seen(bins_of([examples(0, [5] * 40)], [2.5]))
    assert sorted(counts.values()) == [2] * 20 + [3] * 20


def test_replayed_text_has_its_share_of_an_epochs_tokens():
    new, old = [examples(0, [10] * 400)], [examples(500, [10] * 100), examples(900, [10] * 200)]
    weights = replay_weights(new, [1.0], old, [1.0, 3.0], 0.2)
    assert weights[1] == 3 * weights[0]
    counts = seen(bins_of(new + old, [1.0, *weights]))
    replayed = sum(n for (s, _), n in counts.items() if s > 0)
    assert replayed / counts.total() == pytest.approx(0.2, abs=0.002)


def test_weights_that_leave_nothing_are_an_error_and_not_an_endless_search():
    with pytest.raises(DataError, match="an epoch of these sources is empty"):
        bins_of([examples(0, [5])], [0.3]).step(0)


def test_sources_and_their_weights(tmp_path):
    names = [str(tmp_path / name) for name in ("a.txt", "me@home.txt")]
    for name in names:
        (tmp_path / name).write_text("x")
    sources = [names[0], f"{names[0]}@2", f"{names[0]}@0.5", names[1], f"{names[1]}@3"]
    wanted = [(names[0], 1.0), (names[0], 2.0), (names[0], 0.5), (names[1], 1.0), (names[1], 3.0)]
    assert parse_sources(sources) == wanted


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_that_cannot_be(tmp_path, weight):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="must be positive"):
        parse_sources([f"{tmp_path}/a.txt@{weight}"])


def test_no_source_and_a_missing_one():
    with pytest.raises(ConfigError, match="data.sources is empty"):
        parse_sources([])
    with pytest.raises(DataError, match="no/such/file.txt"):
        parse_sources(["no/such/file.txt@2"])


# ---------------------------------------------------------------------------------------------- groups


def test_groups_are_never_split_and_bins_not_overfull():
    rng = np.random.default_rng(3)
    groups = []
    for i in range(50):
        sizes = rng.integers(2, 12, rng.integers(1, 5))
        groups.append([Document(np.full(n, i, np.int32), np.ones(n, np.float32)) for n in sizes])
    groups.append([Document(np.full(40, 50, np.int32), np.ones(40, np.float32))] * 2)  # longer than a bin
    bins = bins_of([Examples(groups)])
    for i in range(len(bins.epoch_bins(0))):
        batch = bins.bin(i)
        owners = documents(batch)
        alone = set(owners) == {50}
        assert alone or len(batch.tokens) <= 64
        for owner in set(owners):
            assert owners.count(owner) == len(groups[owner])
        assert batch.counts["groups"] == len(set(owners))


def test_pairs_are_counted_under_their_name():
    bins = Bins([examples(0, [5] * 4)], [1.0], DataConfig(bin_tokens=64), Mesh.single(), 0, "pairs")
    assert bins.bin(0).counts["pairs"] == 4.0


# ---------------------------------------------------------------------------------------------- text


def stream(seed: int, count: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """A token stream whose tokens are their own places, and where its documents start; some have one token."""
    lengths = np.random.default_rng(seed).integers(1, 60, count)
    return np.arange(lengths.sum()), np.cumsum([0, *lengths])[:-1]


@pytest.mark.parametrize(("context", "capacity"), [(16, 64), (16, 20), (50, 32), (7, 7)])
def test_windows_hold_each_token_once_and_no_document_reaches_into_another(context, capacity):
    tokens, starts = stream(0)
    windows = Windows(tokens, starts, context, capacity)
    pieces = []
    for i, length in enumerate(windows.lengths):
        group = windows[i]
        assert sum(map(len, group)) == length <= capacity
        pieces += group
    assert np.concatenate([d.ids for d in pieces]).tolist() == tokens.tolist()
    begin = np.array([d.ids[0] for d in pieces])
    assert set(starts) <= set(begin)
    assert max(map(len, pieces)) <= context
    whole = np.diff(np.append(starts, len(tokens)))
    for start, length in zip(starts, whole, strict=True):  # no more pieces than the context asks for
        assert ((begin >= start) & (begin < start + length)).sum() == -(-length // min(context, capacity))


@pytest.mark.parametrize("seed", range(3))
def test_an_epoch_of_text_trains_each_token_once_and_has_no_bin_without_a_target(seed):
    tokens, starts = stream(seed)
    bins = bins_of([Windows(tokens, starts, 16, 20)], seed=seed, bin_tokens=20)
    inputs, targets = [], []
    for i in range(len(bins.epoch_bins(0))):
        batch = bins.bin(i)
        assert batch.counts["tokens"] == len(batch.supervised) > 0
        inputs += sum(unpacked(batch), [])
        targets += batch.targets[batch.supervised].tolist()
    begins = {t for i in range(len(bins.sources[0].lengths)) for d in bins.sources[0][i] for t in d.ids[:1].tolist()}
    lone = len(tokens) - len(inputs)  # a document of one token teaches nothing, and may be left out
    assert len(set(inputs)) == len(inputs) and lone < 5
    assert sorted(targets) == [t for t in tokens if t not in begins]


def test_held_out_text_is_never_trained_on(tmp_path, tokenizer):
    rows = [{"text": f"document {i} " + "word " * (i % 7)} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig([str(tmp_path / "a.jsonl")], bin_tokens=64, holdout=0.2)
    train, held_out, weights = text_sources(config, tokenizer, 32, str(tmp_path / "cache"), Skipped())
    texts = []
    for source in (train[0], held_out[0]):
        ids = [d.ids.tolist() for i in range(len(source.lengths)) for d in source[i]]
        texts.append("".join(tokenizer.decode(i) for i in ids))
    assert "".join(texts) == "".join(row["text"] for row in rows)
    assert texts[1].startswith("document ") and 0.1 < len(texts[1]) / len("".join(texts)) < 0.3


def test_text_is_tokenised_once_and_again_when_the_file_changes(tmp_path, tokenizer):
    (source := tmp_path / "a.txt").write_text("What is 1 + 2?")
    config = DataConfig([str(source)], bin_tokens=64, holdout=0.0)

    def read() -> str:
        train, _, _ = text_sources(config, tokenizer, 64, str(tmp_path / "cache"), Skipped())
        return tokenizer.decode(train[0][0][0].ids.tolist())

    assert read() == "What is 1 + 2?"
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    assert read() == "What is 1 + 2?" and made == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    source.write_text("What is 33 + 44?")
    assert read() == "What is 33 + 44?"


def test_documents_of_text_have_a_beginning_and_an_end(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    config = DataConfig([str(tmp_path / "a.jsonl")], bin_tokens=64, holdout=0.0)
    train, _, _ = text_sources(config, tokenizer, 64, str(tmp_path), Skipped())
    found = [d.ids.tolist() for i in range(len(train[0].lengths)) for d in train[0][i]]
    assert found == [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in ("one", "two")]


def test_a_disk_too_full_for_the_tokens_is_a_sentence_and_leaves_nothing_half_written(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="tokens.npy can't be written: .*; free some space"):
            write_array(tmp_path / "cache" / "a.tokens.npy", np.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "cache").iterdir())


# ---------------------------------------------------------------------------------------------- records


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def chats(count: int) -> list[dict]:
    return [{"question": f"What is {i} + 1?", "answer": str(i + 1), "level": i % 3} for i in range(count)]


def read_chats(config: DataConfig, tokenizer, context=64, seed=0):
    skipped = Skipped(config.on_error)
    return *record_sources(config, conversation_group(tokenizer), context, seed, skipped)[:2], skipped


def test_held_out_records_are_never_trained_on(tmp_path, tokenizer):
    config = DataConfig([write(tmp_path / "a.jsonl", chats(50))], bin_tokens=64, holdout=0.2)
    train, held_out, _ = read_chats(config, tokenizer)
    bins = bins_of(train)
    trained = {tuple(ids) for i in range(3 * len(bins.epoch_bins(0))) for ids in unpacked(bins.bin(i))}
    aside = {tuple(group[0].ids.tolist()) for group in held_out[0].groups}
    assert len(aside) == 10 and len(trained) == 40 and not aside & trained
    again = read_chats(config, tokenizer)[1]
    assert {tuple(group[0].ids.tolist()) for group in again[0].groups} == aside
    other = read_chats(config, tokenizer, seed=1)[1]
    assert {tuple(group[0].ids.tolist()) for group in other[0].groups} != aside


def test_one_record_alone_is_trained_on(tmp_path, tokenizer):
    train, held_out, _ = read_chats(DataConfig([write(tmp_path / "a.jsonl", chats(1))], holdout=0.5), tokenizer)
    assert len(train[0].groups) == 1 and not held_out[0].groups


def test_an_epoch_of_records_supervises_each_answer_once(tmp_path, tokenizer):
    config = DataConfig([write(tmp_path / "a.jsonl", chats(50))], holdout=0.0)
    train, _, _ = read_chats(config, tokenizer)
    bins = bins_of(train)
    batches = [bins.bin(i) for i in range(len(bins.epoch_bins(0)))]
    answers = sum(len(tokenizer.encode(row["answer"])) + 1 for row in chats(50))  # 1: the end of the turn
    assert sum(b.counts["tokens"] for b in batches) == answers
    assert all(b.counts["tokens"] > 0 for b in batches)


def test_the_difficulty_is_a_key_of_the_record(tmp_path, tokenizer):
    rows = [*chats(9), {"question": "No level", "answer": "1"}, {"question": "Odd", "answer": "1", "level": "high"}]
    config = DataConfig([write(tmp_path / "a.jsonl", rows)], difficulty="level", holdout=0.0)
    train, _, skipped = read_chats(config, tokenizer)
    assert train[0].difficulty.tolist() == [0, 1, 2] * 3
    assert skipped.reasons.total() == 2 and "KeyError" in skipped.summary()


def test_bad_records_are_skipped_and_counted(tmp_path, tokenizer):
    bad = [{"question": "Q"}, {"messages": [{"role": "assistant", "content": "A"}]}]
    bad += [{"question": "\ud800", "answer": "1"}, {"instruction": "Q", "output": "1", "history": [1]}]
    path = write(tmp_path / "a.jsonl", [*chats(3), *bad])
    train, _, skipped = read_chats(DataConfig([path], holdout=0.0), tokenizer)
    assert len(train[0].groups) == 3 and skipped.reasons.total() == 4
    assert f"{path}:4" in skipped.summary() and "surrogate" in skipped.summary()
    with pytest.raises(DataError, match="a.jsonl:4"):
        read_chats(DataConfig([path], on_error="raise"), tokenizer)


def test_a_file_of_bad_records_says_what_was_wrong(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"question": "Q"}] * 3)
    with pytest.raises(DataError, match="holds no usable record\nskipped 3 × a record without an answer"):
        read_chats(DataConfig([path]), tokenizer)


def test_a_conversation_longer_than_the_context(tmp_path, tokenizer):
    rows = [*chats(2), {"question": "What?", "answer": "long " * 50}, {"question": "long " * 60, "answer": "1"}]
    path = write(tmp_path / "a.jsonl", rows)
    train, _, skipped = read_chats(DataConfig([path], holdout=0.0), tokenizer)
    told = "a record longer than the context of 64 tokens (data.on_overlong=truncate cuts)"
    assert len(train[0].groups) == 2 and skipped.reasons == {told: 2}
    config = DataConfig([path], holdout=0.0, on_overlong="truncate")
    train, _, skipped = read_chats(config, tokenizer)
    assert [len(group[0]) for group in train[0].groups][2] == 64 and len(train[0].groups) == 3
    assert skipped.reasons == {"a record without a supervised token within the context": 1}


def test_truncating_keeps_per_token_fields_with_their_tokens():
    long = Document(np.arange(9, dtype=np.int32), np.ones(9, np.float32), {"value": np.arange(9), "rank": 1.0})
    (cut,) = fit([long], 4, "truncate")
    assert cut.ids.tolist() == cut.fields["value"].tolist() == [0, 1, 2, 3] and cut.fields["rank"] == 1.0
    with pytest.raises(RecordError, match="longer than the context"):
        fit([long], 4, "skip")


# ---------------------------------------------------------------------------------------------- masks


def supervised_text(tokenizer, document: Document) -> str:
    return tokenizer.decode([i for i, w in zip(document.ids.tolist(), document.weights, strict=True) if w], True)


MANY_TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2 + 2?"},
]


def test_every_assistant_turn_of_a_conversation_is_supervised_with_its_end(tokenizer):
    (document,) = conversation_group(tokenizer)({"messages": [*MANY_TURNS, {"role": "assistant", "content": "4"}]})
    assert supervised_text(tokenizer, document) == "2<|im_end|>4<|im_end|>"


def test_only_the_last_answer_of_a_pair_or_a_ranking_is_supervised(tokenizer):
    pair = preference_group(tokenizer)({"messages": MANY_TURNS, "chosen": "4", "rejected": "5, no"})
    assert [supervised_text(tokenizer, d) for d in pair] == ["4<|im_end|>", "5, no<|im_end|>"]
    answers = ranking_group(tokenizer)({"messages": MANY_TURNS, "ranked": ["4", "5", "6"]})
    assert [supervised_text(tokenizer, d) for d in answers] == ["4<|im_end|>", "5<|im_end|>", "6<|im_end|>"]
    assert [d.fields["rank"] for d in answers] == [0.0, 1.0, 2.0]
    starts = [tokenizer.decode(d.ids.tolist(), True).partition("assistant\n")[0] for d in (*pair, *answers)]
    assert len(set(starts)) == 1
