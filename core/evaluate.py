"""What evaluations have in common: forms of multiple choice, likelihoods of continuations, and intervals.

choice   {"question", "choices": [text, …], "answer": text or index}
         {"question", "choices": {"text", "label"}, "answerKey"}                        ARC
         {"question", "correct_answer", "distractor1" …, "support"?}                    SciQ
         {"context", "continuation"}     one choice, right where each of its tokens is the likeliest   LAMBADA
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tritium.core.batch import Document, pack, plan_bins
from tritium.core.files import Skipped, read_records
from tritium.core.formats import RecordError, required_text, usable
from tritium.core.objectives.base import sequence_sum, supervised_logprob
from tritium.core.tokenizer import Tokenizer
from tritium.model.transformer import Transformer

BIN_TOKENS = 4096


@dataclass(frozen=True)
class Choice:
    """A prompt, its possible continuations, and which of them is right."""

    prompt: str
    options: tuple[str, ...]
    answer: int

    @property
    def solved(self) -> str:
        return self.prompt + self.options[self.answer]


def choice(record: dict) -> Choice:
    """A record in any of the module's forms. Raises: RecordError."""
    if "continuation" in record:
        context = required_text(record.get("context"), "context").rstrip()
        return Choice(context, (" " + required_text(record["continuation"], "continuation").strip(),), 0)
    options, right = record.get("choices"), record.get("answer")
    if "correct_answer" in record:
        right = record["correct_answer"]
        options = [right, *(record[key] for key in sorted(record) if key.startswith("distractor"))]
    elif isinstance(options, dict):
        labels, options = options.get("label"), options.get("text")
        right = labels.index(record["answerKey"]) if record.get("answerKey") in (labels or []) else None
    if not isinstance(options, list) or not options or not all(isinstance(o, str) and o.strip() for o in options):
        raise RecordError("a record without choices")
    if isinstance(right, str) and right in options:
        right = options.index(right)
    if not isinstance(right, int) or not 0 <= right < len(options):
        raise RecordError("a record whose answer is none of its choices")
    support = f"{record['support']}\n" if record.get("support") else ""
    prompt = f"{support}Question: {required_text(record.get('question'), 'question')}\nAnswer:"
    return Choice(prompt, tuple(f" {option.strip()}" for option in options), right)


def read_choices(path: str, shots: int, skipped: Skipped) -> list[Choice]:
    """The choices of a file; its first `shots` are solved before each of the others. Raises: DataError."""
    found = []
    for place, record in read_records(path, skipped):
        with usable(skipped, place):
            found.append(choice(record))
    before = "".join(example.solved + "\n\n" for example in found[:shots])
    return [Choice(before + c.prompt, c.options, c.answer) for c in found[shots:]]


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation: its log-probability in nats, its tokens, and whether each of them is the likeliest."""

    logp: float
    tokens: int
    greedy: bool


@torch.no_grad()
def likelihoods(model: Transformer, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
    """Of each (prompt, continuation). A prompt too long for the context loses its beginning."""
    documents = [continuation_document(tokenizer, *pair, model.config.max_positions) for pair in pairs]
    found: dict[int, Likelihood] = {}
    for members in plan_bins([len(d) for d in documents], BIN_TOKENS):
        batch = pack([[documents[i]] for i in members], multiple_of=BIN_TOKENS // 8).to(model.mesh.device)
        result = supervised_logprob(model, batch)
        sums = sequence_sum(result.logp, batch).tolist()
        hits = sequence_sum(result.hit.to(result.logp.dtype), batch).tolist()
        for i, logp, hit in zip(members, sums, hits, strict=True):
            count = int((documents[i].weights[1:] > 0).sum())
            found[i] = Likelihood(logp, count, round(hit) == count)
    return [found[i] for i in range(len(pairs))]


def continuation_document(tokenizer: Tokenizer, prompt: str, continuation: str, context: int) -> Document:
    """The tokens of both together; those that the prompt alone does not begin with carry weight 1."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    whole, before = tokenizer.encode(prompt + continuation), tokenizer.encode(prompt)
    shared = 0
    while shared < min(len(before), len(whole) - 1) and before[shared] == whole[shared]:
        shared += 1
    weights = [0.0] * (len(start) + shared) + [1.0] * (len(whole) - shared)
    return Document(np.array((start + whole)[-context:], np.int32), np.array(weights[-context:], np.float32))


def interval(values: Sequence[float], draws: int = 1, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a mean over problems of values in [0, 1], each a mean over `draws` answers at most.

    Wilson's (1927) of a share, for as many independent answers as would vary like these problems (Kish's effective
    sample size). It stays within [0, 1], and is no point where no problem is solved, or all are.
    """
    table = np.asarray(values, float)
    mean, variance, n = float(table.mean()), float(table.var()), float(len(table))
    if variance > 0:
        n *= min(mean * (1 - mean) / variance, draws)
    middle, spread = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return low if mean > 0 else 0.0, high if mean < 1 else 1.0  # there exactly, not to rounding


def pass_at_k(n: int, right: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): whether one of k of n samples is right, unbiased (Chen et al., arXiv 2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
