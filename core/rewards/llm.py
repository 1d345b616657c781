"""A language model as the judge: behind an OpenAI-compatible endpoint, or in this process, from its folder.

    judge("http://127.0.0.1:8000/v1")             1 … 10 by a rubric, as 0 … 1
    judge("runs/sft", pairwise=True)              against the reference: 1 better, 0.5 equal, 0 worse

Pairs are shown in both orders: a judge that prefers a place, whoever stands there, says "equal" (Zheng et al. 2023,
arXiv 2306.05685, section 3.4).
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tritium.core.chat import parse_reasoning, render, stop_ids
from tritium.core.config import ConfigError, UserError
from tritium.core.rewards import Answer, Composed, Score
from tritium.core.rewards.scorer import COMPARISON, ComparisonReward, FolderModel
from tritium.core.rewards.words import WORDS
from tritium.model.generate import Completion, generate
from tritium.model.sampling import Options

RUBRIC = "how correct, helpful and clear it is"
Question = str | Sequence[dict]  # of one turn, or a conversation that waits for an answer
MARK = re.compile(r"\[(?=(?:end of the |reference )?(?:question|answer))", re.IGNORECASE)
SCORE = re.compile(r"Score[\s*]*:[\s*]*(\d+(?:\.\d+)?)", re.IGNORECASE)
WINNER = re.compile(r"Winner[\s*]*:[\s*]*(?:answer )?(A|B|tie)\b", re.IGNORECASE)
TRANSIENT = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class LLMJudge(Composed):
    """See the module's docstring."""

    model: "Endpoint | LocalModel"
    rubric: str = RUBRIC
    pairwise: bool = False

    def batch(self, answers: Sequence[Answer]) -> list[Score | Exception]:
        asked = [self.questions(answer) for answer in answers]
        replies = iter(self.model.replies([question for questions in asked for question in questions]))
        return [self.verdict([next(replies) for _ in questions]) for questions in asked]

    def questions(self, answer: Answer) -> list[str]:
        prompt, text, reference = (MARK.sub("(", t) for t in (answer.prompt, answer.text, answer.reference))
        if self.pairwise:
            pairs = [(text, reference), (reference, text)] if reference else []
            return [WORDS["questions"]["pair"].format(rubric=self.rubric, prompt=prompt, a=a, b=b) for a, b in pairs]
        known = f"\n\n[reference answer]\n{reference}\n[end of the reference answer]" if reference else ""
        return [WORDS["questions"]["alone"].format(rubric=self.rubric, prompt=prompt, reference=known, text=text)]

    def verdict(self, replies: Sequence[str | Exception]) -> Score | Exception:
        if failed := [reply for reply in replies if isinstance(reply, Exception)]:
            return failed[0]
        if not replies:
            return ValueError("there is no reference answer to compare with")
        said = [parse_reasoning(reply)[1] for reply in replies]
        if not self.pairwise:
            found = SCORE.findall(said[0])
            if not found or not 1 <= float(found[-1]) <= 10:
                return ValueError("the judge gave no score from 1 to 10")
            return Score((float(found[-1]) - 1) / 9, said[0][:300])
        winners = "".join(found[-1].lower() for text in said if (found := WINNER.findall(text)))
        if not re.fullmatch("(a|b|tie){2}", winners):
            return ValueError("the judge named no winner")
        value = {"ab": 1.0, "ba": 0.0}.get(winners, 0.5)
        return Score(value, right=value == 1)


def open_judge(place: str, rubric: str = RUBRIC, pairwise: bool = False, **settings) -> LLMJudge | ComparisonReward:
    """The judge at an address or in a folder; `settings` are those of `Endpoint` or `LocalModel`. Of pairs, it may be a
    model that `tritium reward --loss=comparison` trained."""
    kind = Endpoint if re.match(r"https?://", place) else LocalModel
    if kind is LocalModel and not Path(place).is_dir():
        raise ConfigError(f"reward: judge({place!r}): give the address of an endpoint, e.g. http://127.0.0.1:8000/v1, "
                          "or the folder of a model")  # fmt: skip
    if kind is LocalModel and pairwise and FolderModel(place).heads == (COMPARISON,):
        return ComparisonReward(place)
    return LLMJudge(kind(place, **settings), rubric, pairwise)


@dataclass
class LocalModel(FolderModel):
    """A language model of this process. A reply has an end: `max_tokens`."""

    max_tokens: int = 512
    temperature: float = 0.0
    whole: bool = False  # a reply that a limit cuts off is none

    def __post_init__(self):
        super().__post_init__()
        if self.heads:
            raise ConfigError(f"reward: {self.folder} is a reward model, which can't speak: use model({self.folder!r})")

    def replies(self, questions: Sequence[Question], seeds: Sequence[int] | None = None) -> list[str | Exception]:
        prompts = [self.prompt(question) for question in questions]
        fits = [i for i, ids in enumerate(prompts) if not isinstance(ids, Exception)]
        ends = tuple(stop_ids(self.tokenizer))
        options = Options(temperature=self.temperature, max_tokens=self.max_tokens, stop_ids=ends)
        drawn = [seeds[i] for i in fits] if seeds else 0
        made = generate(self.model, [prompts[i] for i in fits], options=options, seed=drawn)
        found = dict(zip(fits, made, strict=True))
        return [self.said(found[i]) if i in found else prompt for i, prompt in enumerate(prompts)]

    def said(self, completion: Completion) -> str | Exception:
        if self.whole and completion.finish_reason != "stop":
            return RuntimeError(f"a reply cut off after {len(completion.tokens)} tokens")
        return self.tokenizer.decode(completion.tokens)

    def prompt(self, question: Question) -> list[int] | Exception:
        try:
            ids = render(self.tokenizer, conversation(question), generation_prompt=True).ids
        except UserError as error:  # turns or signs that the model's format has no place for
            return error
        context = self.model.config.max_positions
        return ids if len(ids) < context else ValueError(f"a question longer than the model's context of {context}")


def conversation(question: Question) -> list[dict]:
    return [{"role": "user", "content": question}] if isinstance(question, str) else list(question)


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint. The key, where one is needed, is in the environment variable `key`."""

    url: str
    model: str = "default"
    key: str = "OPENAI_API_KEY"
    seconds: float = 60.0  # of one try
    tries: int = 4
    wait: float = 1.0  # seconds before the second try; twice as long before each further one
    parallel: int = 8
    temperature: float = 0.0
    max_tokens: int = 0  # of a reply (0: as many as the endpoint gives)
    whole: bool = False  # a reply that a limit cuts off is none

    def replies(self, questions: Sequence[Question], seeds: Sequence[int] | None = None) -> list[str | Exception]:
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self.reply, questions, seeds or [None] * len(questions)))

    def reply(self, question: Question, seed: int | None = None) -> str | Exception:
        try:
            return self.ask(question, seed)
        except Exception as error:
            return error

    def ask(self, question: Question, seed: int | None = None) -> str:
        """The model's reply. Tries again where the endpoint is busy or unreachable. Raises: RuntimeError."""
        body = {"model": self.model, "messages": conversation(question), "temperature": self.temperature}
        body |= {k: v for k, v in {"max_tokens": self.max_tokens, "seed": seed}.items() if v}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        for number in range(self.tries):
            if number:
                time.sleep(self.wait * 2 ** (number - 1))
            try:
                choice = json.loads(self.read(request))["choices"][0]
                if self.whole and choice.get("finish_reason") == "length":
                    problem = "it was cut off by max_tokens"
                    break
                return str(choice["message"]["content"])
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                if error.code not in TRANSIENT:
                    break
            except (OSError, ValueError, LookupError, TypeError) as error:
                problem = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
        raise RuntimeError(f"no reply from {self.url}: {problem}")

    def read(self, request: urllib.request.Request) -> bytes:
        """The whole reply. Raises: TimeoutError, also where it comes drop by drop."""
        until, parts = time.monotonic() + self.seconds, []
        with urllib.request.urlopen(request, timeout=self.seconds) as reply:
            while part := reply.read1():
                parts.append(part)
                if time.monotonic() > until:
                    raise TimeoutError(f"no whole reply in {self.seconds:g} s")
        return b"".join(parts)
