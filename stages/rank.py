"""Rank answers by hand: a local web page, or the terminal; writes what `reward --loss=listwise` reads.

    tritium evaluate --model=… --data=problems.jsonl --samples=4 --sampling.temperature=1 --save=answers.jsonl
    tritium rank --data=answers.jsonl --out=rankings.jsonl                 http://127.0.0.1:8808
    tritium rank --data=answers.jsonl --out=rankings.jsonl --terminal --who=anna

Records hold a prompt and "answers": [text, …], and perhaps "scores": a number for each, or a list of numbers (one of
each model of an ensemble). The files of `generate --n=4`, and of `evaluate --save` (its answers to one prompt
together), are read as such too. First come the prompts on whose answers the ensemble disagrees most, then those with
the smallest margin between two scores.
"""

import getpass
import json
import random
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np

from tritium.core.config import REQUIRED, UserError, check_ranges, opt
from tritium.core.files import LONE_SURROGATE, DataError, Skipped, read_records
from tritium.core.formats import Message, RecordError, open_prompt, usable
from tritium.core.output import make_room_for
from tritium.core.run import Result
from tritium.core.web import Handler, RequestError, Server

SHOWS_ITS_RESULT = True
ONE_PROCESS = True


@dataclass
class Config:
    data: str = opt(REQUIRED, "file of prompts with their answers")
    out: str = opt("rankings.jsonl", "file that rankings are appended to; prompts already in it are not shown again")
    who: str = opt("", "name of the annotator (default: the user's name)")
    terminal: bool = opt(False, "rank in the terminal instead of a web page")
    port: int = opt(8808, "port of the web page (0: any free one)", least=0, below=1 << 16)

    def __post_init__(self):
        check_ranges(self)


@dataclass
class Item:
    """A prompt and its answers; `scores[i]` are those of answer i, one of each model."""

    messages: list[Message]
    answers: list[str]
    scores: list[list[float]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return json.dumps(self.messages, ensure_ascii=False)

    @property
    def urgency(self) -> tuple[float, float]:
        """Least first: minus the ensemble's disagreement on a pair (0 … ¼), then the smallest margin."""
        if not self.scores:
            return 0.0, float("inf")
        doubt, margin = 0.0, float("inf")
        for a, b in combinations(self.scores, 2):
            share = sum((x > y) + 0.5 * (x == y) for x, y in zip(a, b, strict=True)) / len(a)
            doubt = max(doubt, share * (1 - share) if len(a) > 1 else 0.0)
            margin = min(margin, abs(sum(a) - sum(b)) / len(a))
        return -doubt, margin


def read_item(record: dict) -> Item:
    """Raises: RecordError for what can't be ranked."""
    answers = record.get("answers", [record.get("answer")])
    if isinstance(answers, list):  # of `generate`: {"text": …} each
        answers = [a.get("text") if isinstance(a, dict) else a for a in answers]
    if not isinstance(answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
        raise RecordError('a record without "answers", a list of texts')
    score = record.get("score")
    scores = record.get("scores", [score["value"]] if isinstance(score, dict) and "value" in score else [])
    try:
        scores = [[float(x) for x in (row if isinstance(row, list) else [row])] for row in scores]
        fit = not scores or len(scores) == len(answers) and np.isfinite(scores).all()  # rows of one length, too
    except (TypeError, ValueError):
        fit = False
    if not fit:
        raise RecordError('a record whose "scores" are not one (of each model) for each answer')
    messages = open_prompt({k: v for k, v in record.items() if k != "answer"})
    if LONE_SURROGATE.search("".join([*answers, *(str(m["content"]) for m in messages)])):
        raise RecordError("a text that is not valid Unicode")
    return Item(messages, answers, scores)


def read_items(path: str, skipped: Skipped) -> list[Item]:
    """The prompts of a file, most urgent first; different answers only. Raises: DataError where there is none."""
    items: dict[str, Item] = {}
    for place, record in read_records(path, skipped):
        with usable(skipped, place):
            item = read_item(record)
            known = items.setdefault(item.key, Item(item.messages, []))
            for i, answer in enumerate(item.answers):
                if answer not in known.answers:
                    known.answers.append(answer)
                    known.scores += item.scores[i : i + 1]
    open_ones = [item for item in items.values() if 2 <= len(item.answers) <= 26]
    for _ in range(sum(len(item.answers) > 26 for item in items.values())):
        skipped.add("a prompt with more different answers than there are letters", path)
    for item in open_ones:
        if len({len(row) for row in item.scores}) != 1 or len(item.scores) != len(item.answers):
            item.scores = []  # of some answers only
    if not open_ones:
        raise DataError(f"data: {path} holds no prompt with two different answers\n{skipped.summary()}")
    return sorted(open_ones, key=lambda item: item.urgency)


def parse_verdict(text: str, count: int) -> list[list[int]]:
    """Answers by level, best first: "B>A=C" (all of them), "5 3 4" (scores), or "B" (the best; the others tie).

    Raises: UserError saying what is wrong with it.
    """
    text, letters = text.strip().upper(), [chr(65 + i) for i in range(count)]
    if text in letters:
        best = letters.index(text)
        return [[best], [i for i in range(count) if i != best]]
    if re.fullmatch(r"[A-Z](\s*[>=]\s*[A-Z])+", text):
        levels = [[letters.index(c) if c in letters else -1 for c in re.split(r"\s*=\s*", part.strip())]
                  for part in text.split(">")]  # fmt: skip
        if sorted(i for level in levels for i in level) != list(range(count)):
            raise UserError(f"{text!r} must name each of {', '.join(letters)} once")
        return levels
    try:
        scores = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        scores = []
    if len(scores) != count or not all(abs(s) < float("inf") for s in scores):
        raise UserError(f"write a ranking (B>A=C), {count} scores (5 3 …) or the best ({'/'.join(letters)})")
    return [[i for i, s in enumerate(scores) if s == value] for value in sorted(set(scores), reverse=True)]


class Session:
    """Which items are left for whom, and the file that verdicts are added to. Safe in threads."""

    def __init__(self, items: Sequence[Item], out: Path):
        self.items, self.out, self.lock = items, out, threading.Lock()
        self.done: set[tuple[str, str]] = set()
        self.skipped: set[tuple[str, int]] = set()
        if out.is_file() and out.stat().st_size:
            rows = read_records(str(out), Skipped("raise"))
            self.done = {(str(r.get("who")), json.dumps(r.get("prompt"), ensure_ascii=False)) for _, r in rows}

    def left(self, who: str) -> list[int]:
        """Places of the items that `who` has neither ranked nor skipped."""
        seen = [(who, item.key) in self.done or (who, i) in self.skipped for i, item in enumerate(self.items)]
        return [i for i, was in enumerate(seen) if not was]

    def order(self, place: int, who: str) -> list[int]:
        """The order in which `who` sees the answers: where one stands should say nothing about it."""
        order = list(range(len(self.items[place].answers)))
        random.Random(f"{who} {self.items[place].key}").shuffle(order)
        return order

    def shown(self, place: int, who: str) -> list[str]:
        return [self.items[place].answers[i] for i in self.order(place, who)]

    def next(self, who: str) -> dict:
        """What the page shows `who`: the first item left, how many there are, and for whom this is."""
        left = self.left(who)
        row = {"left": len(left), "who": who}
        if not left:
            return row
        return row | {"id": left[0], "messages": self.items[left[0]].messages, "answers": self.shown(left[0], who)}

    def record(self, place: int, who: str, verdict: str) -> None:
        """Add a verdict on the answers as `shown`. Raises: UserError."""
        if not who.strip():
            raise UserError("say who you are first")
        shown = self.shown(place, who)
        levels = [[shown[i] for i in level] for level in parse_verdict(verdict, len(shown))]
        ranked = [level[0] if len(level) == 1 else level for level in levels]
        row = {"prompt": self.items[place].messages, "ranked": ranked, "who": who, "verdict": verdict}
        row["when"] = datetime.now(UTC).isoformat(timespec="seconds")
        with self.lock, self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.done.add((who, self.items[place].key))


def train(config: Config) -> Result:
    """Serve the page until Ctrl-C, or ask in the terminal until nothing is left; `ranked` counts the new rankings."""
    skipped = Skipped()
    session = Session(read_items(config.data, skipped), make_room_for(config.out, "out"))
    skipped.tell()
    before, who = len(session.done), config.who or getpass.getuser()
    if config.terminal:
        ask(session, who)
    else:
        server = make_server(session, config.port, who)
        print(f"http://127.0.0.1:{server.server_port}  (Ctrl-C ends; rankings go to {config.out})", file=sys.stderr)
        server.run()
    return Result(config.out, {"ranked": float(len(session.done) - before)})


def ask(session: Session, who: str) -> None:
    """In the terminal: one line for each prompt; an empty one skips, Ctrl-D ends."""
    for place in session.left(who):
        for message in session.items[place].messages:
            print(f"\n[{message['role']}] {message['content']}")
        shown = session.shown(place, who)
        for i, answer in enumerate(shown):
            print(f"\n── {chr(65 + i)} ──\n{answer}")
        while True:
            try:
                line = input("\nB>A=C, scores, or the best (empty: skip, Ctrl-D: end)> ").strip()
                if line:
                    session.record(place, who, line)
                break
            except UserError as error:
                print(error)
            except UnicodeDecodeError:
                print("that is no UTF-8 text")
            except EOFError:
                return


def make_server(session: Session, port: int, who: str) -> Server:
    """The page, on this machine only. Raises: UserError where the port is taken."""
    page = Path(__file__).with_name("rank.html").read_text("utf-8")

    class Page(Handler):
        longest = 1 << 20

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            if not self.local():
                self.send_failure("this page is for this machine only", 403)
            elif address.path == "/":
                self.send(200, page)
            elif address.path == "/next":
                query = {key: values[0] for key, values in parse_qs(address.query).items()}
                name = query.get("who", "").strip() or who
                if (skip := query.get("skip", "")).isdecimal() and len(skip) < 10:
                    session.skipped.add((name, int(skip)))
                self.send(200, session.next(name))
            else:
                self.send_failure(f"there is no {address.path}", 404)

        def local(self) -> bool:
            """Not a page from elsewhere whose name was made to mean this machine."""
            return self.headers.get("Host", "").partition(":")[0] in ("127.0.0.1", "localhost")

        def do_POST(self) -> None:
            try:
                body = self.read_json()
                typed = self.headers.get("Content-Type") == "application/json"  # which another site's form can't send
                if self.path != "/rank" or not typed or not self.local():
                    raise RequestError("POST JSON to /rank")
                place, name = int(body["id"]), str(body.get("who", "")).strip() or who
                if not 0 <= place < len(session.items):
                    raise RequestError(f"there is no item {place}")
                session.record(place, name, str(body["verdict"]))
                self.send(200, {"left": len(session.left(name))})
            except (RequestError, UserError) as error:
                self.send_failure(str(error), 400)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                self.send_failure(f"malformed request ({type(error).__name__}: {error})", 400)

    return Server("127.0.0.1", port, Page)


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("rank"))
