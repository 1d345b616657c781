"""Models that `tritium reward` trained as judges: of an answer, and of each of its steps. Any base, with its own
tokenizer and template."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from tritium.core.batch import Document, PackedBatch, pack, plan_bins
from tritium.core.checkpoint import CheckpointError, model_folder
from tritium.core.config import ConfigError
from tritium.core.groups import answer_document, comparison_document, split_steps, step_document
from tritium.core.rewards import Answer, Composed, Score
from tritium.core.setup import load_tokenizer, read_model
from tritium.core.tokenizer import Tokenizer
from tritium.model.heads import ScalarModel
from tritium.model.hf import ModelFolderError, heads_in
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh

BIN_TOKENS = 8192
COMPARISON, STEPS = "comparison", "steps"  # the heads of models that see two answers, or judge each step
USES = {COMPARISON: "judge({!r}, pairwise=True)", STEPS: "process({!r})"}


@dataclass
class FolderModel:
    """A model in a folder that judges: read when it is first asked, by default on this process's device alone."""

    folder: str
    dtype: str = "auto"
    mesh: Mesh | None = None

    def __post_init__(self):
        try:
            self.heads = heads_in(model_folder(self.folder))
        except (ModelFolderError, CheckpointError) as error:
            raise ConfigError(f"reward: {error}") from None

    @cached_property
    def model(self) -> ScalarModel | Transformer:
        mesh = self.mesh or Mesh.single("cuda" if torch.cuda.is_available() else "cpu")
        return read_model(self.folder, self.dtype, mesh).requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder, self.model)


@dataclass
class ModelReward(FolderModel, Composed):
    """The score of the whole conversation, rendered and tokenized as the reward model was trained; Σ weight · head
    where it has several, whose values `parts` keep.

    An answer that does not fit its context fails: it is counted, and teaches nothing.
    """

    weights: dict[str, float] = field(default_factory=dict)
    head = ""  # of the models that this class alone reads

    def __post_init__(self):
        super().__post_init__()
        if not self.heads:
            raise ConfigError(f"reward: {self.folder} is a language model: train one with `tritium reward`")
        if (use := USES.get(self.heads[0])) and self.heads[0] != self.head:
            raise ConfigError(f"reward: {self.folder} scores no whole answers: {use.format(self.folder)}")
        if (len(self.heads) > 1 and not self.weights) or not set(self.weights) <= set(self.heads):
            example = ", ".join(f"{name}={1 / len(self.heads):.2g}" for name in self.heads)
            raise ConfigError(f"reward: weigh the heads of {self.folder}: model({self.folder!r}, {example})")

    @torch.no_grad()
    def batch(self, answers: Sequence[Answer]) -> list[Score | Exception]:
        context, found = self.model.config.max_positions, {}
        documents = [self.document(answer) for answer in answers]
        fitting = [i for i, document in enumerate(documents) if len(document) <= context]
        for members in plan_bins([len(documents[i]) for i in fitting], BIN_TOKENS):
            chosen = [fitting[j] for j in members]
            batch = pack([[documents[i]] for i in chosen], multiple_of=BIN_TOKENS // 8).to(self.model.mesh.device)
            rows = self.values(batch, [documents[i] for i in chosen])
            found |= {i: self.score(answers[i], row.tolist()) for i, row in zip(chosen, rows, strict=True)}
        too_long = ValueError(f"an answer longer than the reward model's context of {context}")
        return [found.get(i, too_long) for i in range(len(answers))]

    def document(self, answer: Answer) -> Document:
        return answer_document(self.tokenizer, conversation_of(answer), answer.text)

    def values(self, batch: PackedBatch, documents: Sequence[Document]) -> Sequence[Tensor]:
        """What the model says of each document."""
        return self.model.scores(batch.tokens, batch.cu_seqlens, batch.positions)[: batch.sequences]

    def score(self, answer: Answer, value: float | list[float]) -> Score:
        if not self.weights:
            return Score(value, right=False)
        parts = dict(zip(self.heads, value if isinstance(value, list) else [value], strict=True))
        return Score(sum(w * parts[name] for name, w in self.weights.items()), parts=parts, right=False)


class ComparisonReward(ModelReward):
    """How likely an answer is better than the reference, by a model of `tritium reward --loss=comparison` that sees
    both, in either order."""

    head = COMPARISON

    def batch(self, answers: Sequence[Answer]) -> list[Score | Exception]:
        shown = super().batch([*answers, *(replace(a, text=a.reference, reference=a.text) for a in answers)])
        return [self.verdict(*both) for both in zip(answers, shown[: len(answers)], shown[len(answers) :], strict=True)]

    def verdict(self, answer: Answer, first: Score | Exception, second: Score | Exception) -> Score | Exception:
        if not answer.reference:
            return ValueError("there is no reference answer to compare with")
        if failed := [score for score in (first, second) if isinstance(score, Exception)]:
            return failed[0]
        better = (1.0 + math.tanh((first.value - second.value) / 4.0)) / 2.0  # σ of the mean log-odds
        return Score(better, right=better > 0.5)

    def document(self, answer: Answer) -> Document:
        return comparison_document(self.tokenizer, conversation_of(answer), answer.text, answer.reference)


def open_scorer(folder: str, dtype: str = "auto", mesh: Mesh | None = None) -> ModelReward:
    """The reward model in a folder, of answers or of comparisons. Raises: ConfigError where there is none."""
    return (ComparisonReward if FolderModel(folder).heads == (COMPARISON,) else ModelReward)(folder, dtype, mesh)


def conversation_of(answer: Answer) -> list[dict]:
    return list(answer.messages) or [{"role": "user", "content": answer.prompt}]


@dataclass
class ProcessReward(ModelReward):
    """How likely each step of an answer is right, by a model of `tritium reward --loss=process`; the answer's value is
    their minimum (Wang et al., arXiv 2312.08935, section 3.4) or product (Lightman et al., arXiv 2305.20050). An answer
    without a step gets 0.

    `ends` is known where the answer comes with its decoder; of steps that end in one token the worst counts.
    """

    over: str = "min"
    head = STEPS

    def __post_init__(self):
        super().__post_init__()
        if self.over not in ("min", "product"):
            raise ConfigError(f"reward: process(over={self.over!r}): min or product")

    def document(self, answer: Answer) -> Document:
        return step_document(self.tokenizer, conversation_of(answer), [s for s, _ in split_steps(answer.text)])[0]

    def values(self, batch: PackedBatch, documents: Sequence[Document]) -> Sequence[Tensor]:
        values = self.model.values(batch.tokens, batch.cu_seqlens, batch.positions)  # [T]
        return values[batch.supervised].sigmoid().split([int((d.weights > 0).sum()) for d in documents])

    def score(self, answer: Answer, value: Sequence[float]) -> Score:
        if not value:
            return Score(0.0, "no steps", right=False)
        whole = min(value) if self.over == "min" else math.prod(value)
        at: dict[int, float] = {}
        for end, step in zip(token_ends(answer, [end for _, end in split_steps(answer.text)]), value, strict=False):
            at[end] = min(step, at.get(end, 1.0))
        return Score(whole, steps=tuple(at.values()) or tuple(value), ends=tuple(at), right=False)


def token_ends(answer: Answer, ends: Sequence[int]) -> list[int]:
    """The token that completes each of these places in the text, ascending; none without a decoder."""
    if answer.decoder is None or not len(answer.ids):
        return []
    decoder, lengths = answer.decoder(), [0]
    for id in answer.ids:
        lengths.append(lengths[-1] + len(decoder.push(id)))
    return [min(bisect_left(lengths, end), len(answer.ids)) - 1 for end in ends]
