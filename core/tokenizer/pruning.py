"""A tokenizer with fewer tokens: those that a text uses, what these are merged from, bytes, and all that are added.

Kept ids keep their order, so that row i of the model's pruned embedding is `kept[i]` of the old one. Text that the
vocabulary was pruned for is encoded to the same tokens as before.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tritium.core.config import UserError
from tritium.core.tokenizer.files import read_parts
from tritium.core.tokenizer.pieces import Pieces
from tritium.core.tokenizer.tokenizer import Tokenizer


def prune(tokenizer: Tokenizer, used: Iterable[int]) -> tuple[Tokenizer, list[int]]:
    """(the pruned tokenizer, the old ids that it keeps, in order). Raises: UserError where its kind can't be pruned."""
    files = dict(tokenizer._parts.files)
    if isinstance(tokenizer._engine, Pieces):
        main = next(name for name in files if name.endswith(".model"))
        kept, files[main] = prune_pieces(tokenizer._engine, set(used))
        files.pop("tokenizer.json", None)  # the same vocabulary again, for transformers, which reads the other as well
        size = len(tokenizer._engine.pieces)
        kept += sorted({t.id for t in tokenizer._parts.added.values() if t.id >= size})
        place = {old: new for new, old in enumerate(kept)}
    elif "tokenizer.json" in files:
        main = "tokenizer.json"
        content, place = prune_merges(json.loads(files[main]), tokenizer, set(used))
        kept, files[main] = sorted(place), json.dumps(content, ensure_ascii=False).encode()
        for name in ("vocab.json", "merges.txt"):
            files.pop(name, None)
    else:
        known = "SentencePiece's tokenizer.model and Hugging Face's tokenizer.json"
        raise UserError(f"{', '.join(files)}: only {known} can be pruned; convert it to one")
    if "added_tokens.json" in files:
        added = json.loads(files["added_tokens.json"])
        files["added_tokens.json"] = json.dumps({t: place[i] for t, i in added.items() if i in place}).encode()
    if "tokenizer_config.json" in files:
        config = json.loads(files["tokenizer_config.json"])
        table = config.get("added_tokens_decoder", {})
        if table:
            config["added_tokens_decoder"] = {str(place[int(i)]): t for i, t in table.items() if int(i) in place}
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return Tokenizer(read_parts(main, files)), kept


def prune_merges(content: dict, tokenizer: Tokenizer, used: set[int]) -> tuple[dict, dict[int, int]]:
    """(a tokenizer.json's content pruned, old id → new)."""
    surface, vocab = tokenizer._engine.surface, content["model"]["vocab"]
    ranks = {token: rank for rank, token in enumerate(surface.values())}
    ids = {token: i for i, token in surface.items()}
    kept = {i for token, i in ids.items() if len(token) == 1} | {t.id for t in tokenizer._parts.added.values()}
    for i in used & surface.keys():
        symbols = [surface[i][at : at + 1] for at in range(len(surface[i]))]
        kept |= {ids[token] for token in [surface[i], *merged_from(symbols, lambda pair: ranks.get(pair))]}
    place = {old: new for new, old in enumerate(sorted(kept))}
    content["model"]["vocab"] = vocab = {token: place[i] for token, i in vocab.items() if i in place}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    content["model"]["merges"] = [[a, b] for a, b in pairs if {a, b, a + b} <= vocab.keys()]
    for token in content.get("added_tokens") or []:
        token["id"] = place[token["id"]]
    for template in ((content.get("post_processor") or {}).get("special_tokens") or {}).values():
        template["ids"] = [place[i] for i in template["ids"]]
    return content, place


def prune_pieces(engine: Pieces, used: set[int]) -> tuple[list[int], bytes]:
    """(old ids that are kept, the model). A ModelProto is a run of fields; those with the tag 0x0A are the pieces."""
    fields = list(proto_fields(engine.model))
    pieces = [raw for tag, raw in fields if tag == 0x0A]
    ids = {piece: i for i, piece in enumerate(engine.pieces)}
    scores = engine.scores
    kept = {i for i in ids.values() if engine.fixed(i)} | used & set(ids.values())
    for i in list(kept):
        kept |= {ids[p] for p in merged_from(list(engine.pieces[i]), lambda p: -scores[ids[p]] if p in ids else None)}
    kept |= {i for i in ids.values() if len(engine.pieces[i]) == 1}
    rest = b"".join(raw for tag, raw in fields if tag != 0x0A)
    return sorted(kept), b"".join(pieces[i] for i in sorted(kept)) + rest


def merged_from(symbols: list, rank: Callable[[Any], float | None]) -> Iterator[Any]:
    """What byte-pair encoding makes of the symbols, all that it makes on the way: the pair of the lowest rank first."""
    while len(symbols) > 1:
        pairs = [symbols[i] + symbols[i + 1] for i in range(len(symbols) - 1)]
        ranked = [(found, i) for i, pair in enumerate(pairs) if (found := rank(pair)) is not None]
        if not ranked:
            return
        _, i = min(ranked)
        symbols[i : i + 2] = [pairs[i]]
        yield pairs[i]


def proto_fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(tag, the whole field) of a serialized protobuf whose fields are all length-delimited."""
    at = 0
    while at < len(data):
        start, (tag, at) = at, varint(data, at)
        size, at = varint(data, at)
        at += size
        yield tag, data[start:at]


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number, where the next thing begins)."""
    value, shift = 0, 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
