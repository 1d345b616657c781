"""Reject: judge the answers of each document, and write what the stages train on.

    accept   {judge: least value}   every answer must pass, e.g. {"tags('think')" = 1, "words('bad.txt')" = 1}
    verify   by the reference: "auto" is `math` for results and `code` for tests; a wrong answer is no SFT row
    score    a judge that ranks what is left: a reward model's heads, a language model, any sum of core/rewards

What a judge says is kept in OUT/said.sqlite: a run that was killed goes on with the same scores, and asks nobody twice.
Of an answer that a judge failed on nothing is learned, neither that it is good nor that it is worse than another.

The files hold what the pipeline leaves: steps that come after this one may drop documents, or take them twice.

    sft.jsonl        at most `keep` of the best right answers, that compute differently, as conversations
    pairs.jsonl      a right (or best) answer and a wrong (or worse) one
    rankings.jsonl   answers of different score, best first

`pass_rate` is the share of right ones among answers that models gave: a difficulty to select by.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import tritium
from tritium.core.chat import parse_reasoning
from tritium.core.config import opt
from tritium.core.curate.kept import digest, remembered, state
from tritium.core.curate.step import Context, Document, Drop, Job, Outcome, Piece, Step, note, read_shard, scored
from tritium.core.output import write_lines
from tritium.core.rewards import Answer, Reward, Score, judge
from tritium.core.select import by_worth, distinct_paths


@dataclass
class Reject(Step):
    """Judge answers; a document without one that is good enough is dropped."""

    accept: dict[str, float] = opt({}, "minimum value per judge")
    verify: str = opt("auto", "verifier: auto, none, math_verify (the library), or a reward of core/rewards")
    score: str = opt("", "judge that ranks answers (empty: right before wrong only)")
    least: float = opt(-1e9, "minimum score of an answer to learn from")
    keep: int = opt(1, "most answers per document", least=0)
    pairs: int = opt(1, "most pairs per document", least=0)
    gold: bool = opt(True, "also learn from gold answers, not only from models'")

    FILES: ClassVar[tuple[str, ...]] = ("sft.jsonl", "pairs.jsonl", "rankings.jsonl")
    BATCH: ClassVar[int] = 256
    LOCAL: ClassVar[bool] = True

    def check(self) -> None:
        for spec in self.specs:
            self.judge(spec)
        super().check()

    @property
    def specs(self) -> list[str]:
        """All judges, but for what "auto" stands for."""
        verify = [] if self.verify in ("auto", "none") else [self.verify]
        return [*self.accept, *verify, *([self.score] if self.score else [])]

    def files(self) -> list[str]:
        """What the judges are read from, as far as it is on this disk."""
        named = re.findall(r"'([^']*)'|\"([^\"]*)\"", " ".join(self.specs))
        return [file for file in map("".join, named) if file and Path(file).exists()]

    def judge(self, spec: str) -> Reward:
        """Made once. Raises: ConfigError."""
        from tritium.core.rewards.make import make_reward  # it loads torch, which other processes need not

        if spec not in self.judges:
            self.judges[spec] = math_verify if spec == "math_verify" else make_reward(spec)
        return self.judges[spec]

    @cached_property
    def judges(self) -> dict[str, Reward]:
        return {}

    def takes(self, document: Document) -> bool:
        return document["kind"] != "text" and super().takes(document)

    def several(self, documents: list[Document], job: Job) -> list[Outcome]:
        self.mark(documents, job)
        return [self.verdict(document) for document in documents]

    def mark(self, documents: list[Document], job: Job) -> None:
        """Leave with each answer its scores, whether it is "right", and why it was rejected."""
        for spec, least in self.accept.items():
            for answer, value, _ in self.ask(spec, documents, job):
                if value < least:
                    answer["rejected"] = f"{spec} {value:.3g} < {least:g}"
        for spec in ("math", "code") if self.verify == "auto" else (self.verify,) * (self.verify != "none"):
            known = [d for d in documents if d["reference"] and (self.verify != "auto" or verifier(d) == spec)]
            for answer, _, solved in self.ask(spec, known, job):
                answer["right"] = solved
        for answer, value, _ in self.ask(self.score, documents, job) if self.score else ():
            answer["score"] = value

    def ask(self, spec: str, documents: list[Document], job: Job) -> Iterator[tuple[dict, float, bool]]:
        """(answer, a judge's value of it, whether that is right); an answer that it fails on is counted and marked."""
        pairs = [(d, a) for d in documents for a in d["answers"]]
        by = digest(tritium.__version__, spec, [state(file) for file in self.files()])

        def say(new: list[int]) -> list[list | None]:
            shown = [Answer(words(a["text"]), a["text"], d["messages"][-1]["content"], d["reference"], d["messages"])
                     for d, a in (pairs[i] for i in new)]  # fmt: skip
            judged = judge(self.judge(spec), shown)
            for failure, n in judged.failures.items():
                job.notes[f"{spec} failed: {failure[:200]}"] += n
            return [None if score is None else [score.value, score.solved] for score in judged.scores]

        keys = [digest(by, d["messages"], d["reference"], a["text"]) for d, a in pairs]
        said = remembered(job.context.cache, keys, say)
        for (_, answer), score in zip(pairs, said, strict=True):
            if score is None:
                answer["unjudged"] = spec
            else:
                yield answer, *score

    def verdict(self, document: Document) -> Outcome:
        answers = document["answers"]
        tried = [a["right"] for a in answers if "right" in a and a["by"] != "gold"]
        if tried:
            scored(document, "pass_rate", sum(tried) / len(tried))
        if any("score" in a for a in answers):
            scored(document, "best_score", max(a["score"] for a in answers if "score" in a))
        if not answers:
            return Drop("no answer")
        if not (answers := judged(document)):
            return Drop("no answer that could be judged", document["answers"][0]["unjudged"])
        if not any(map(self.learnable, answers)):
            why = next((a["rejected"] for a in answers if "rejected" in a), f"reference {document['reference'][:80]}")
            wrong = any(a.get("right") is False for a in answers)
            return Drop("no right answer" if wrong else "no answer passes", why)
        note(document, answers=len(answers), right=sum(a.get("right", False) for a in answers))
        return document

    def learnable(self, answer: dict) -> bool:
        good = answer.get("right", True) and "rejected" not in answer and answer.get("score", 0.0) >= self.least
        return good and (self.gold or answer["by"] != "gold")

    def publish(self, context: Context, shards: list[Piece]) -> dict[str, Any]:
        counts = {}
        for name, rows in zip(self.FILES, (self.sft, self.preferred, self.ranked), strict=True):
            documents = (d for shard in shards for d in read_shard(shard.path) if self.takes(d))
            counts[name] = write_lines(context.out / name, (row for d in documents for row in rows(d)))
        return counts

    def sft(self, document: Document) -> Iterator[dict]:
        best = sorted(filter(self.learnable, judged(document)), key=worth, reverse=True)
        for i in distinct_paths([a["text"] for a in best])[: self.keep]:
            answer = {"role": "assistant", "content": best[i]["text"]}
            yield {"messages": [*document["messages"], answer], "id": document["id"]}

    def preferred(self, document: Document) -> Iterator[dict]:
        found = by_worth(judged(document), itemgetter("text"), worth)
        better = [a["text"] for a in found[0] if self.learnable(a)] if found else []
        worse = [a["text"] for level in found[1:] for a in level]
        for chosen, rejected in list(zip(better, worse, strict=False))[: self.pairs]:
            yield {"prompt": document["messages"], "chosen": chosen, "rejected": rejected}

    def ranked(self, document: Document) -> Iterator[dict]:
        found = by_worth(judged(document), itemgetter("text"), worth)
        if len(found) > 1:
            yield {"prompt": document["messages"], "ranked": [level[0]["text"] for level in found]}


def math_verify(ids: Sequence, text: str, *, prompt: str = "", reference: str = "") -> Score:
    """The library's judgement, as a judge of ours; where its time is up, it raises."""
    from math_verify import parse, verify

    return Score(float(verify(parse(f"${reference}$"), parse(parse_reasoning(text)[1]))))


def verifier(document: Document) -> str:
    """By which a reference is compared: tests are a JSON object, a set such as {1, 2} is not."""
    return "code" if document["reference"].startswith('{"') else "math"


def judged(document: Document) -> list[dict]:
    """The answers that no judge failed on."""
    return [answer for answer in document["answers"] if "unjudged" not in answer]


def words(text: str) -> list[str]:
    """Stand for an answer's tokens, where a judge counts them."""
    return text.split()


def worth(answer: dict) -> tuple:
    """By which answers are ranked: accepted ones, then right ones, then by score."""
    return "rejected" not in answer, answer.get("right", True), round(answer.get("score", 0.0), 6)
