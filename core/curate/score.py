"""Scores from models: perplexity, instruction-following difficulty, and classifiers trained here on given examples."""

from dataclasses import dataclass
from functools import cached_property
from math import exp
from pathlib import Path
from typing import ClassVar

from tritium.core.config import REQUIRED, ConfigError, opt
from tritium.core.curate.step import Context, Document, Drop, Job, Outcome, Piece, Step, scored, text_of
from tritium.core.files import Skipped, read_documents
from tritium.core.rewards.classifier import Rules, train_classifier


@dataclass
class Bounded(Step):
    """A step that gives a score, and may drop by it."""

    low: float = opt(-1e30, "drop documents that score below this")
    high: float = opt(1e30, "drop documents that score above this")

    def judged(self, document: Document, name: str, value: float) -> Outcome:
        scored(document, name, round(value, 6))
        if self.low <= value <= self.high:
            return document
        return Drop(f"{name} out of bounds", f"{name} {value:.4g} is not in [{self.low:g}, {self.high:g}]")


@dataclass
class Perplexity(Bounded):
    """Under a model of ours: exp of the mean loss per token; of a long text, of its last `context` tokens. With `ifd`,
    the instruction-following difficulty instead: loss of the answer given the prompt / loss of the answer alone (Li et
    al., arXiv 2308.12032, section 2.3)."""

    model: str = opt(REQUIRED, "language model folder")
    ifd: bool = opt(False, "score answers by instruction-following difficulty (IFD): how little the prompt helps")

    BATCH: ClassVar[int] = 128
    LOCAL: ClassVar[bool] = True
    PATHS: ClassVar[tuple[str, ...]] = ("model",)

    def takes(self, document: Document) -> bool:
        return super().takes(document) and (not self.ifd or (document["kind"] != "text" and bool(document["answers"])))

    @cached_property
    def loaded(self):
        from tritium.core.rewards.scorer import FolderModel

        folder = FolderModel(self.model)
        if folder.heads:
            raise ConfigError(f"model={self.model} is a reward model; this needs a language model")
        return folder

    def losses(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Mean loss per token of each continuation, nats."""
        from tritium.core.evaluate import likelihoods

        found = likelihoods(self.loaded.model, self.loaded.tokenizer, pairs)
        return [-said.logp / max(said.tokens, 1) for said in found]

    def several(self, documents: list[Document], job: Job) -> list[Outcome]:
        if self.ifd:
            answers = [d["answers"][0]["text"] for d in documents]
            prompts = [d["messages"][-1]["content"] + "\n" for d in documents]
            given = self.losses(list(zip(prompts, answers, strict=True)))
            alone = self.losses([("", answer) for answer in answers])
            values = [a / max(b, 1e-9) for a, b in zip(given, alone, strict=True)]
        else:
            values = [exp(min(loss, 50.0)) for loss in self.losses([("", text_of(d)) for d in documents])]
        name = "ifd" if self.ifd else "perplexity"
        return [self.judged(d, name, value) for d, value in zip(documents, values, strict=True)]


@dataclass
class Classify(Bounded):
    """The probability of a good text, by a classifier of hashed character n-grams (core/rewards/classifier.py), that is
    trained here on texts that are good and texts that are bad: quality, safety, coherence, as the examples are."""

    name: str = opt("quality", "name of the score")
    good: list[str] = opt([], "files of good texts, as `pretrain` reads them")
    bad: list[str] = opt([], "files of bad texts")
    characters: int = opt(2000, "characters of a text that are read", least=1)

    PATHS: ClassVar[tuple[str, ...]] = ("good", "bad")

    def check(self) -> None:
        super().check()
        if not self.good or not self.bad:
            raise ConfigError("good and bad must each name a file of examples")

    def prepare(self, context: Context, shards: list[Piece]) -> None:
        labelled = ((self.good, False), (self.bad, True))
        examples = [(text[: self.characters], label) for files, label in labelled
                    for file in files for text in read_documents(file, Skipped())]  # fmt: skip
        train_classifier(examples, str(self.weights_file(context)), seed=context.seed)

    def weights_file(self, context: Context) -> Path:
        return context.scratch / "classifier.npz"

    def several(self, documents: list[Document], job: Job) -> list[Outcome]:
        good = Rules(str(self.weights_file(job.context)))
        return [self.judged(d, self.name, good((), text_of(d)[: self.characters]).value) for d in documents]
