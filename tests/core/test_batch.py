"""The packed stream: what stands where, what counts, and where groups may go."""

import numpy as np
import pytest

from tritium.core.batch import IGNORE, Document, pack, plan_bins


def document(ids, weights=None, **fields) -> Document:
    weights = np.ones(len(ids), np.float32) if weights is None else np.array(weights, np.float32)
    return Document(np.array(ids, np.int32), weights, fields)


def test_the_stream_of_the_modules_picture():
    batch = pack([[document([1, 2, 3])], [document([4, 5])], [document([6, 7, 8, 9], [1, 0, 1, 1])]])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.targets.tolist() == [2, 3, IGNORE, 5, IGNORE, 7, 8, 9, IGNORE]
    assert batch.weights.tolist() == [1, 1, 0, 1, 0, 0, 1, 1, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9]
    assert batch.doc_start.tolist() == [0, 0, 0, 3, 3, 5, 5, 5, 5]
    assert batch.doc_end.tolist() == [3, 3, 3, 5, 5, 9, 9, 9, 9]
    assert batch.supervised.tolist() == [0, 1, 3, 6, 7]
    assert batch.lengths == (3, 2, 4)
    assert batch.sequences == 3


def test_tokens_are_counted_by_their_weight_and_groups_as_groups():
    pair = [document([1, 2, 3], [0, 0.5, 0.25]), document([4, 5], [0, 2])]
    batch = pack([pair, [document([6, 7])]], {"pairs": 1.0})
    assert batch.counts == {"tokens": 3.75, "stream": 7.0, "sequences": 3.0, "groups": 2.0, "pairs": 1.0}


def test_the_weight_of_a_first_token_is_never_used():
    heavy = document([1, 2], [100, 1])
    assert pack([[document([3, 4]), heavy]]).counts["tokens"] == 2.0


def test_fields_of_a_token_stand_where_it_is_the_target_and_those_of_a_sequence_once():
    documents = [
        document([1, 2, 3], value=np.array([10, 20, 30]), reward=0.5),
        document([4, 5], value=np.array([40, 50]), reward=-1.0),
    ]
    batch = pack([documents])
    assert batch.fields["value"].tolist() == [20, 30, 0, 50, 0]
    assert batch.fields["reward"].tolist() == [0.5, -1.0]


def test_fillers_reach_a_multiple_and_count_for_nothing():
    first = document([1, 2, 3], value=np.array([7, 8, 9]), reward=2.0)
    groups = [[first, document([4, 5], value=np.ones(2), reward=1.0)]]
    batch, free = pack(groups, multiple_of=100), pack(groups)
    assert len(batch.tokens) == batch.cu_seqlens[-1] == 100 and free.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens[:3].tolist() == [0, 3, 5] and batch.cu_seqlens.diff().max() <= 64
    assert batch.supervised.tolist() == free.supervised.tolist()
    assert batch.counts == free.counts and batch.counts["stream"] == 5.0 and batch.sequences == free.sequences == 2
    assert batch.lengths == free.lengths == (3, 2)
    assert batch.fields["reward"].tolist() == [2.0, 1.0]
    assert batch.fields["value"].tolist() == [8, 9, 0, 1, 0] + [0] * 95
    assert batch.positions.tolist() == [0, 1, 2, 0, 1] + [0] * 95  # they fit in any context
    assert len(pack(groups, multiple_of=5).tokens) == 5


def test_an_empty_batch_is_legal():
    batch = pack([], multiple_of=8)
    assert len(batch.tokens) == len(batch.supervised) == batch.sequences == 0 and batch.counts["tokens"] == 0
    assert batch.cu_seqlens.tolist() == [0]


def test_the_first_tokens_of_a_document_keep_their_fields():
    cut = document([1, 2, 3], [0, 1, 1], value=np.array([1, 2, 3]), reward=0.5).first(2)
    assert (cut.ids.tolist(), cut.weights.tolist()) == ([1, 2], [0, 1])
    assert cut.fields["value"].tolist() == [1, 2] and cut.fields["reward"] == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_bins_hold_every_item_once_and_no_more_than_fits(seed):
    rng = np.random.default_rng(seed)
    lengths, capacity = rng.integers(1, 60, 300).tolist(), 50  # some are longer than a bin
    bins = plan_bins(lengths, capacity, window=int(rng.integers(1, 9)))
    assert sorted(i for members in bins for i in members) == list(range(300))
    for members in bins:
        assert len(members) == 1 or sum(lengths[i] for i in members) <= capacity


def test_bins_are_filled_well_and_keep_the_items_order():
    lengths = np.random.default_rng(0).integers(1, 50, 1000).tolist()
    bins = plan_bins(lengths, 100)
    firsts = [members[0] for members in bins]
    assert firsts == sorted(firsts) and all(members == sorted(members) for members in bins)
    assert sum(lengths) / (100 * len(bins)) > 0.97
    assert bins == plan_bins(lengths, 100)
    assert plan_bins([], 100) == []
