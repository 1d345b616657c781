"""What the watch says of ranks that are silent, stuck or gone. (With real processes: tests/faults.)"""

import json

import pytest
import torch.distributed as dist

from tritium.parallel.mesh import Mesh
from tritium.parallel.watch import GRACE, PERIOD, Watch, Word, is_of_a_collective

NOW, TIMEOUT, WORLD = 1000.0, 40.0, "world"
LIMIT = 0.75 * TIMEOUT


def watch(rank: int = 0, failed: bool = False, **words: Word) -> Watch:
    """Of `rank` of three, all of which have just spoken unless `words` (r0, r1, r2) say otherwise."""
    one = Watch(Mesh(rank=rank, world_size=3, timeout=TIMEOUT))
    one.step, one.doing, one.answered = 8, "backward", NOW
    one.words = {i: words.get(f"r{i}", word(5)) for i in range(3)}
    if failed:
        one.failure, one.failed_at = "Connection reset by peer", NOW - GRACE - 2 * PERIOD
    return one


def word(begun: int, *, silent: float = 0.0, still: float = 0.0, step: int = 7, doing: str = "forward") -> Word:
    """Nothing heard for so long, and nothing new."""
    return Word(step=step, doing=doing, begun={WORLD: begun}, heard=NOW - silent, moved=NOW - max(silent, still))


def test_nothing_is_said_while_all_is_well():
    assert watch().verdict(NOW) == []
    assert watch(r1=word(4, silent=LIMIT - 1, still=LIMIT - 1)).verdict(NOW) == []


def test_a_silent_rank_is_lost_and_where_it_was_is_told():
    (sentence,) = watch(r1=word(4, silent=LIMIT + 1)).verdict(NOW)
    assert sentence == (
        "rank 1 is lost: not heard of for 31 s. It was last in step 7, forward, and did not come to collective 5 of "
        "the world group, where ranks 0, 2 wait"
    )


def test_each_lost_rank_has_a_sentence():
    sentences = watch(r1=word(4, silent=LIMIT + 1), r2=word(5, silent=LIMIT + 2)).verdict(NOW)
    assert [s[:16] for s in sentences] == ["rank 1 is lost: ", "rank 2 is lost: "]
    assert "ranks 0, 2 wait" in sentences[0] and sentences[1].endswith("step 7, forward")


def test_a_living_rank_that_others_wait_for_is_lost_and_they_are_not():
    waiting = word(6, still=LIMIT + 1)
    (sentence,) = watch(r0=waiting, r1=waiting, r2=word(5, still=LIMIT + 1, doing="load")).verdict(NOW)
    assert sentence.startswith(
        "rank 2 is lost: nothing new from it for 31 s. It was last in step 7, load, and did not come"
    )
    assert sentence.endswith("collective 6 of the world group, where ranks 0, 1 wait")


def test_ranks_that_all_work_long_are_not_lost():
    assert watch(**{f"r{i}": word(5, still=10 * TIMEOUT) for i in range(3)}).verdict(NOW) == []


def test_groups_are_compared_among_their_members_only():
    busy, idle = word(5), word(5, still=LIMIT + 1)
    busy.begun["tp (ranks 0, 1)"], idle.begun["tp (ranks 2, 3)"] = 90, 3
    assert watch(r0=busy, r1=busy, r2=idle).verdict(NOW) == []


def test_once_a_collective_failed_seconds_are_enough():
    (sentence,) = watch(rank=2, failed=True, r1=word(4, silent=GRACE + 1)).verdict(NOW)
    assert sentence.startswith("rank 1 is lost: not heard of for 3 s.")
    assert sentence.endswith("(seen by rank 2 in step 8, backward: Connection reset by peer)")


def test_a_failure_waits_until_all_words_have_been_read():
    one = watch(rank=2, failed=True, r1=word(4, silent=GRACE + 1))
    one.failed_at = NOW - GRACE
    assert one.verdict(NOW) == []


def test_a_collective_that_failed_with_all_ranks_alive_is_told_too():
    sentences = watch(failed=True).verdict(NOW)
    assert sentences == ["a collective failed on rank 0 in step 8, backward: Connection reset by peer"]


def test_a_store_that_does_not_answer_means_rank_0_or_its_host():
    one = watch(rank=1)
    one.answered = NOW - LIMIT - 1
    assert one.verdict(NOW) == [
        "rank 1, in step 8, backward, has lost rank 0 or its host: the run's store there has not answered for 31 s"
    ]


def test_a_rank_that_is_not_the_first_looks_after_the_first():
    assert watch(rank=1, r2=word(5, silent=10 * TIMEOUT)).verdict(NOW) == []  # it does not read the others' words
    assert watch(rank=1, r0=word(5, silent=LIMIT + 1)).verdict(NOW)[0].startswith("rank 0 is lost")


def test_a_word_is_news_when_more_than_its_number_has_changed():
    one, said = Word(), [7, "forward", {WORLD: 3}]
    one.update(json.dumps([1, *said]).encode(), 1.0)
    one.update(json.dumps([2, *said]).encode(), 2.0)
    one.update(json.dumps([2, *said]).encode(), 3.0)
    assert (one.heard, one.moved, one.step, one.doing, one.begun) == (2.0, 1.0, *said)


def test_one_process_has_no_threads_and_its_errors_are_its_own():
    with Watch(Mesh.single()) as one, pytest.raises(RuntimeError, match="gloo"), one.phase("forward"):
        assert one.doing == "forward" and not one.threads
        raise RuntimeError("gloo: no peer")
    assert one.doing == "starting"


def test_errors_of_collectives_are_known_from_others():
    assert is_of_a_collective(dist.DistNetworkError("timeout"))
    assert is_of_a_collective(RuntimeError("[…/gloo/transport/tcp/pair.cc:537] Read error"))
    assert not is_of_a_collective(RuntimeError("shape mismatch"))
