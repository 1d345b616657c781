"""A reward model as a judge: any base, with its own tokenizer and template."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tritium.core.batch import pack, plan_bins
from tritium.core.data import answer_document
from tritium.core.rewards import Answer, Score
from tritium.core.tokenizer import Tokenizer
from tritium.model.heads import ScalarModel

BIN_TOKENS = 8192


@dataclass(frozen=True)
class ModelReward:
    """The score of the whole conversation, rendered and tokenized as the reward model was trained.

    An answer that does not fit its context fails: it is counted, and teaches nothing.
    """

    model: ScalarModel
    tokenizer: Tokenizer

    def __call__(self, ids: Sequence[int], text: str, *, prompt: str = "", reference: str = "") -> Score:
        (score,) = self.batch([Answer(ids, text, prompt, reference)])
        if isinstance(score, Exception):
            raise score
        return score

    @torch.no_grad()
    def batch(self, answers: Sequence[Answer]) -> list[Score | Exception]:
        context, found = self.model.config.max_positions, {}
        documents = {i: self.document(answer) for i, answer in enumerate(answers)}
        fitting = [i for i, document in documents.items() if len(document) <= context]
        for members in plan_bins([len(documents[i]) for i in fitting], BIN_TOKENS):
            chosen = [fitting[j] for j in members]
            batch = pack([[documents[i]] for i in chosen], multiple_of=BIN_TOKENS // 8).to(self.model.mesh.device)
            scores = self.model.scores(batch.tokens, batch.cu_seqlens, batch.positions)[: batch.sequences]
            found |= {i: Score(value, right=False) for i, value in zip(chosen, scores.tolist(), strict=True)}
        too_long = ValueError(f"an answer longer than the reward model's context of {context}")
        return [found.get(i, too_long) for i in range(len(answers))]

    def document(self, answer: Answer):
        messages = list(answer.messages) or [{"role": "user", "content": answer.prompt}]
        return answer_document(self.tokenizer, messages, answer.text)
