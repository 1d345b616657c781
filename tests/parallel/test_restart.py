"""A start of a run does not meet what an earlier one left in the store."""

import threading

import pytest
import torch.distributed as dist

from tritium.parallel.restart import own_part


def start(store: dist.Store, ranks: int, timeout: float = 30.0) -> list[dist.Store | str]:
    """The stores, or errors, of ranks that start together, the first one last."""
    found: list[dist.Store | str] = [""] * ranks

    def join(rank: int) -> None:
        try:
            found[rank] = own_part(store, rank, ranks, timeout)
        except RuntimeError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("died", [(), (0,), (1, 2)])  # ranks that got no further than their first word
def test_every_rank_finds_its_own_start_after_another(died):
    store = dist.HashStore()
    if died:
        for rank in died:
            store.set(f"ask/{rank}", "dead -")
            store.set(f"answer/{rank}", "dead stale")
    else:
        for part in start(store, 3):
            part.set("address", "old")
    parts = start(store, 3)
    assert not any(part.check(["address"]) for part in parts)
    parts[0].set("address", "new")
    assert [part.get("address") for part in parts] == [b"new"] * 3


def test_a_rank_that_never_starts_is_named():
    store = dist.HashStore()
    with pytest.raises(RuntimeError, match="these ranks did not start in time: 1, 2"):
        own_part(store, 0, 3, 0.05)
    with pytest.raises(RuntimeError, match="did not start in time: 0"):
        own_part(store, 1, 3, 0.05)
