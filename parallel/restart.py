"""A store of our own for each start of a run, where torchrun's outlives the processes.

After a restart torchrun's store still holds the addresses of processes that died, and a rank that reads one before its
new owner writes it can't connect. Agents on several hosts don't count restarts alike, so no variable tells the starts
apart. Therefore rank 0 names the start, and every other rank learns the name by a word that only this process can have
left:

    rank r → "ask/r": its nonce        rank 0 → "answer/r": that nonce, the name        rank r → "ask/r": nonce, name
"""

import time
from uuid import uuid4

import torch.distributed as dist

PAUSE = 0.02  # seconds


def own_part(store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.Store:
    """The part of `store` that belongs to this start. Every rank must call it.

    Raises: RuntimeError naming the ranks that did not within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    name = name_start(store, world_size, deadline) if rank == 0 else learn_name(store, rank, deadline)
    return dist.PrefixStore(name, store)


def name_start(store: dist.Store, world_size: int, deadline: float) -> str:
    """Rank 0's side: answer until every rank has said the name back."""
    name, missing = uuid4().hex, set(range(1, world_size))
    while missing:
        for rank in sorted(missing):
            nonce, said = read(store, f"ask/{rank}")
            store.set(f"answer/{rank}", f"{nonce} {name}")
            if said == name:
                missing.remove(rank)
        pause(deadline, missing)
    return name


def learn_name(store: dist.Store, rank: int, deadline: float) -> str:
    """The side of the others: ask until the answer is to this process."""
    nonce = uuid4().hex
    store.set(f"ask/{rank}", f"{nonce} -")
    while (answer := read(store, f"answer/{rank}"))[0] != nonce:
        pause(deadline, {0})
    store.set(f"ask/{rank}", f"{nonce} {answer[1]}")
    return answer[1]


def read(store: dist.Store, key: str) -> tuple[str, str]:
    """A pair of words, without waiting for it."""
    if not store.check([key]):
        return "-", "-"
    first, second = store.get(key).decode().split()
    return first, second


def pause(deadline: float, missing: set[int]) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError(f"these ranks did not start in time: {', '.join(map(str, sorted(missing)))}")
    time.sleep(PAUSE)
