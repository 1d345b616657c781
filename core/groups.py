"""From a record to the group of documents that an objective takes: what is supervised, and the fields it needs."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import numpy as np

from tritium.core.batch import Convert, Document, Group
from tritium.core.chat import render
from tritium.core.data import DataConfig
from tritium.core.formats import RecordError, conversation, feedback, preference, ranking, scored, steps
from tritium.core.tokenizer import Tokenizer


def conversation_group(tokenizer: Tokenizer, config: DataConfig | None = None) -> Convert:
    """record → the conversation, every assistant turn supervised; or, by `config.turns`, its last, or each alone."""
    config = config or DataConfig()

    def convert(record: dict) -> Group:
        messages = conversation(record)
        rendered = [chat_document(tokenizer, m, config.thinking) for m in chosen_turns(messages, config.turns)]
        return [normalized(document, config.normalize) for document in rendered]

    return convert


def chosen_turns(messages: list[dict], turns: str) -> list[list[dict]]:
    """The conversation as it is ("all"), with its last answer alone to learn, or up to each answer ("unrolled")."""
    if turns == "all":
        return [messages]
    learned = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
    if turns == "last":
        return [[*silent(messages[: learned[-1]]), messages[learned[-1]]]] if learned else [messages]
    return [[*silent(messages[:i]), messages[i]] for i in learned] or [messages]


def silent(messages: Sequence[dict]) -> list[dict]:
    """The messages, their answers read but not learned."""
    return [m | {"weight": 0.0} if m["role"] == "assistant" else m for m in messages]


def normalized(document: Document, by: str) -> Document:
    """The document with weights that sum, over each turn or over all of it, to what they were on average."""
    weights, learned = document.weights, document.weights > 0
    if by == "token" or not learned.any():
        return document
    if by == "sequence":
        return replace(document, weights=weights / np.float32(learned.sum()))
    edges = np.flatnonzero(np.diff(learned.astype(np.int8), prepend=0, append=0))  # a turn: a run of learned tokens
    weights = weights.copy()
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        weights[start:end] /= np.float32(end - start)
    return replace(document, weights=weights)


def preference_group(tokenizer: Tokenizer) -> Convert:
    """record → [chosen, rejected], only the last answer supervised; `margin` per sequence is the record's, or 0."""

    def convert(record: dict) -> Group:
        prompt, chosen, rejected = preference(record)
        documents = [answer_document(tokenizer, prompt, answer) for answer in (chosen, rejected)]
        margin = record.get("margin") or 0.0
        if not isinstance(margin, int | float) or not math.isfinite(margin):
            raise RecordError(f"a margin that is not a number: {margin!r}")
        for document in documents:
            document.fields["margin"] = float(margin)
        return documents

    return convert


def ranking_group(tokenizer: Tokenizer) -> Convert:
    """record → its answers, best first; `rank` per sequence counts from 0, equal answers have the same."""

    def convert(record: dict) -> Group:
        prompt, levels = ranking(record)
        documents = []
        for rank, answers in enumerate(levels):
            for answer in answers:
                documents.append(answer_document(tokenizer, prompt, answer))
                documents[-1].fields["rank"] = float(rank)
        return documents

    return convert


def comparison_text(prompt: list[dict], first: str, second: str) -> str:
    """What a model that compares is shown; it answers the user, who quotes the conversation."""
    said = "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    return f"{said}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nWhich answer is better, A or B?"


def comparison_document(tokenizer: Tokenizer, prompt: list[dict], first: str, second: str) -> Document:
    message = {"role": "user", "content": comparison_text(prompt, first, second)}
    ids = render(tokenizer, [message], generation_prompt=True).ids
    return Document(np.array(ids, np.int32), np.ones(len(ids), np.float32))


def comparison_group(tokenizer: Tokenizer) -> Convert:
    """record → both answers in one document, the chosen one first; and again, the rejected one first."""

    def convert(record: dict) -> Group:
        prompt, chosen, rejected = preference(record)
        return [comparison_document(tokenizer, prompt, *pair) for pair in ((chosen, rejected), (rejected, chosen))]

    return convert


def score_group(tokenizer: Tokenizer, names: Sequence[str] = ("score",), highest: float = 1.0) -> Convert:
    """record → its answer; the scores of these names per sequence, as shares of the highest possible."""

    def convert(record: dict) -> Group:
        prompt, answer, scores = scored(record, names, highest)
        document = answer_document(tokenizer, prompt, answer)
        document.fields |= scores
        return [document]

    return convert


def split_steps(text: str) -> list[tuple[str, int]]:
    """(step, where it ends in the text): a step is a line that is not blank, without the space around it."""
    return [(found[0], found.end()) for found in re.finditer(r"\S(?:[^\n]*\S)?", text)]


def step_document(tokenizer: Tokenizer, prompt: list[dict], parts: Sequence[str]) -> tuple[Document, list[int]]:
    """(the prompt and the steps, a line each, then the newline that ends the answer; the places that the weights mark).

    A mark stands after its step, whose value is read at the step's last token: of predicting what comes next.
    """
    newline = tokenizer.encode("\n")
    ids, marks = list(render(tokenizer, prompt, generation_prompt=True).ids), []
    for text in parts:
        ids += [*tokenizer.encode(text), *newline]
        marks.append(len(ids))
    ids += newline
    weights = np.zeros(len(ids), np.float32)
    weights[marks] = 1.0
    return Document(np.array(ids, np.int32), weights), marks


def step_group(tokenizer: Tokenizer) -> Convert:
    """record → its `step_document`; a step of several lines becomes one. `label` at a mark says whether it is right."""

    def convert(record: dict) -> Group:
        prompt, parts = steps(record)
        lines = [" ".join(line for line, _ in split_steps(text)) for text, _ in parts]
        document, marks = step_document(tokenizer, prompt, lines)
        document.fields["label"] = np.zeros(len(document), np.float32)
        document.fields["label"][marks] = [float(right) for _, right in parts]
        return [document]

    return convert


def feedback_group(tokenizer: Tokenizer) -> Convert:
    """record → its answer, or both of its pair; `good` and `index`, the place among all, per sequence."""
    places = count()

    def convert(record: dict) -> Group:
        prompt, answers = feedback(record)
        documents = []
        for answer, good in answers:
            documents.append(answer_document(tokenizer, prompt, answer))
            documents[-1].fields |= {"good": float(good), "index": float(next(places))}
        return documents

    return convert


def chat_document(tokenizer: Tokenizer, messages: list[dict], thinking: str = "") -> Document:
    rendered = render(tokenizer, messages, thinking=thinking)
    return Document(np.array(rendered.ids, np.int32), np.array(rendered.weights, np.float32))


def answer_document(tokenizer: Tokenizer, prompt: list[dict], answer: str) -> Document:
    """The prompt, its earlier answers included, at weight 0; `answer` at weight 1."""
    return chat_document(tokenizer, [*silent(prompt), {"role": "assistant", "content": answer}])
