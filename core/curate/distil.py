"""Distil: a teacher's answers, chains of thought, and new problems. What is asked is in prompts.toml, a table a task.

The teacher is a model's folder, or an OpenAI-compatible endpoint. Its replies are kept in OUT/said.sqlite by a hash of
all that they depend on, so that a run that was killed gets the same ones. A reply that does not come (after tries
with back-off), or has not what was asked for, is counted and shown; the document goes on without it.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from tritium.core.chat import parse_reasoning
from tritium.core.config import REQUIRED, ConfigError, UserError, opt
from tritium.core.curate.kept import digest, remembered, state
from tritium.core.curate.runner import priority
from tritium.core.curate.step import Document, Drop, Job, Outcome, Step, best_answer, note, prompt_text
from tritium.core.files import LONE_SURROGATE

TASKS = ("answer", "chain", "counterfactual", "text", "facts", "self-instruct", "evolve", "revise")
UNFIT = "the teacher's reply is not what was asked for"
SLOT = re.compile(r"\{(\w+)\}")


@cache
def tasks() -> dict[str, dict]:
    return tomllib.loads((resources.files("tritium.core.curate") / "prompts.toml").read_text("utf-8"))


@dataclass
class State:
    """What the calls have given so far of one sample; `path` says which it is."""

    document: int
    values: dict[str, str]
    path: str = ""


@dataclass
class Distil(Step):
    """Ask a teacher."""

    teacher: str = opt(REQUIRED, "model folder, or URL of an endpoint, e.g. http://127.0.0.1:8000/v1")
    task: str = opt("answer", "what to ask the teacher for", choices=TASKS)
    which: str = opt("unverified", "which documents: those without a reference or tests, without an answer, or all",
                     choices=("unverified", "unanswered", "all"))  # fmt: skip
    n: int = opt(1, "samples per document (facts: per fact)", least=1)
    model: str = opt("default", "endpoint: model name")
    temperature: float = opt(0.7, "sampling temperature", least=0)
    max_tokens: int = opt(512, "most tokens per reply; a reply that is cut off is discarded", least=1)
    batch: int = opt(64, "documents per batch of requests", least=1)
    seconds: float = opt(120.0, "endpoint: timeout of one request, in seconds", above=0)
    tries: int = opt(5, "endpoint: attempts per request", least=1)
    wait: float = opt(1.0, "endpoint: seconds before the first retry, doubled before each further one", least=0)

    LOCAL: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if not self.remote and not Path(self.teacher).is_dir():
            raise ConfigError(f"teacher={self.teacher!r} is neither a folder nor a URL like http://127.0.0.1:8000/v1")

    @property
    def remote(self) -> bool:
        return self.teacher.startswith(("http://", "https://"))

    def files(self) -> list[str]:
        return [] if self.remote else [self.teacher]

    @property
    def drawn(self) -> dict[str, Any]:
        """How replies are drawn: with the teacher, the question and the seed all that they depend on."""
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, "whole": True}

    @cached_property
    def source(self) -> Any:
        from tritium.core.rewards.llm import Endpoint, LocalModel  # they load torch, which other processes need not

        if not self.remote:
            return LocalModel(self.teacher, **self.drawn)
        waits = {"seconds": self.seconds, "tries": self.tries, "wait": self.wait}
        return Endpoint(self.teacher, self.model, **waits, **self.drawn)

    def takes(self, document: Document) -> bool:
        needs = tasks()[self.task]["needs"]
        if not super().takes(document) or (document["kind"] == "text") != (needs == "text"):
            return False
        if needs == "answer":
            return bool(document["answers"])
        known = document.get("reference" if self.which == "unverified" else "answers")
        return needs == "text" or self.which == "all" or not known

    @property
    def BATCH(self) -> int:
        return self.batch

    def several(self, documents: list[Document], job: Job) -> list[Outcome]:
        states, drops = self.converse(documents, job)
        mine = [[s for s in states if s.document == i] for i in range(len(documents))]
        return [self.made(d, mine[i], drops.get(i, [])) for i, d in enumerate(documents)]

    def converse(self, documents: list[Document], job: Job) -> tuple[list[State], dict[int, list[Drop]]]:
        """The calls of the task, each for all documents together: what they gave, and what failed, by document."""
        prompts = [prompt_text(d) for d in documents]
        states = [State(i, known(d, prompts, i), f"{d['id']}/{job.name}") for i, d in enumerate(documents)]
        drops: dict[int, list[Drop]] = {}
        for call in tasks()[self.task]["calls"]:
            times = self.n if call.get("sampled") else 1
            asked = [State(s.document, s.values, f"{s.path}.{k}") for s in states for k in range(times)]
            seeds = [priority(s.path, job.context.seed) for s in asked]
            questions = [self.question(call, s, documents, seed) for s, seed in zip(asked, seeds, strict=True)]
            states = []
            for s, reply in zip(asked, self.ask(questions, seeds, job), strict=True):
                found = extracted(reply, call["fields"])
                if isinstance(found, Drop):
                    drops.setdefault(s.document, []).append(found)
                    continue
                rows = [(s.path, found)]
                if call.get("lines"):
                    ((name, text),) = found.items()
                    rows = [(f"{s.path}.{i}", {name: line}) for i, line in enumerate(bulleted(text))]
                    if not rows:
                        drops.setdefault(s.document, []).append(Drop(UNFIT, f"no list: {text[:300]}"))
                states += [State(s.document, s.values | values, path) for path, values in rows]
        return states, drops

    def ask(self, questions: list[list[dict]], seeds: list[int], job: Job) -> list[str | Exception]:
        """Raises: UserError where none of many gets a reply: the teacher is not there."""
        by = digest(self.teacher, self.model, self.drawn, [state(f) for f in self.files()])

        def say(new: list[int]) -> list[str | Exception]:
            said = self.source.replies([questions[i] for i in new], [seeds[i] for i in new])
            if self.remote and len(said) > 7 and all(isinstance(reply, Exception) for reply in said):
                raise UserError(f"the teacher gave none of {len(said)} replies ({said[0]}): "
                                "start it, and this command again")  # fmt: skip
            return said

        keys = [digest(by, q, s) for q, s in zip(questions, seeds, strict=True)]
        return remembered(job.context.cache, keys, say)

    def question(self, call: dict, s: State, documents: list[Document], seed: int) -> list[dict]:
        prompt = call["prompts"][seed % len(call["prompts"])]
        if not prompt:
            return documents[s.document]["messages"]
        return [{"role": "user", "content": filled(prompt, s.values)}]

    def made(self, document: Document, states: list[State], drops: list[Drop]) -> Outcome:
        """The document with the answers, or beside new ones; and what failed."""
        task, by = tasks()[self.task], f"teacher/{self.task}"
        note(document, teacher=self.teacher.rstrip("/").rpartition("/")[2], replies=len(states))
        answers = [{"text": filled(task["answer"], s.values), "by": by} for s in states]
        if task.get("makes") != "document":
            document["answers"] += answers
            return [document, *drops] if document["answers"] or not drops else drops
        labels = {key: document[key] for key in ("source", "licence", "language")}
        labels |= {"kind": "chat", "reference": "", "scores": {}}
        history = [*document["provenance"], {"step": by, "of": document["id"]}]
        asked = ([{"role": "user", "content": filled(task["question"], s.values)}] for s in states)
        new = [
            {"id": s.path, "messages": messages, "answers": [answer], "provenance": [dict(p) for p in history]} | labels
            for s, messages, answer in zip(states, asked, answers, strict=True)
        ]
        return [document, *new, *drops]


def known(document: Document, prompts: list[str], i: int) -> dict[str, str]:
    """What a prompt may name of a document."""
    others = [prompts[(i + k) % len(prompts)] for k in range(min(4, len(prompts)))]
    values = {"prompt": prompts[i], "examples": "\n\n".join(f"Task: {text}" for text in others)}
    if document["kind"] == "text":
        return values | {"text": document["text"]}
    return values | {"answer": best_answer(document), "reference": document["reference"]}


def filled(template: str, values: dict[str, str]) -> str:
    """With {names} replaced, once: what a document says in braces stays as it is."""
    return SLOT.sub(lambda match: values.get(match[1], match[0]), template).strip()


def extracted(reply: str | Exception, fields: Sequence[str]) -> dict[str, str] | Drop:
    """The fields of a reply: in tags, after labels, or, of one, all of it; or why there are none."""
    if isinstance(reply, Exception):
        return Drop("the teacher did not answer", str(reply))
    if LONE_SURROGATE.search(reply):
        return Drop(UNFIT, "it is not valid Unicode")
    said = parse_reasoning(reply)[1] or reply if fields != ["reply"] else reply
    found = {name: m[1].strip() for name in fields if (m := re.search(rf"<{name}>(.*?)</{name}>", said, re.DOTALL))}
    if len(found) < len(fields):
        ends = "|".join(fields)
        label = r"(?ims)^\W{{0,40}}{0}\W{{0,40}}?:(?:\*\*|__)?\s*(.*?)(?=^\W{{0,40}}(?:{1})\W{{0,40}}?:|\Z)"
        found |= {f: m[1].strip() for f in fields if f not in found and (m := re.search(label.format(f, ends), said))}
    if len(fields) == 1 and not found:
        found = {fields[0]: said.strip()}
    missing = [name for name in fields if not found.get(name)]
    why = f"no {', '.join(missing)}: {reply[:300]}"
    return Drop(UNFIT, why) if missing else found


def bulleted(text: str) -> list[str]:
    """The lines of a list, without their bullets and numbers."""
    lines = (re.sub(r"^\s*(?:[-*•]|\d+[.)])\s*", "", line).strip() for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if line))
