"""A reward model as a judge: any base, with its own tokenizer and template; and the judge that a stage asks for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tritium.core.batch import Document, pack, plan_bins
from tritium.core.config import ConfigError
from tritium.core.groups import answer_document
from tritium.core.rewards import Answer, Reward, Score
from tritium.core.rewards.make import Composed, WeightedSum, make_reward
from tritium.core.setup import load_tokenizer, read_model
from tritium.core.tokenizer import Tokenizer
from tritium.model.heads import ScalarModel
from tritium.parallel.mesh import Mesh

BIN_TOKENS = 8192


@dataclass(frozen=True)
class ModelReward(Composed):
    """The score of the whole conversation, rendered and tokenized as the reward model was trained.

    An answer that does not fit its context fails: it is counted, and teaches nothing.
    """

    model: ScalarModel
    tokenizer: Tokenizer

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

    def document(self, answer: Answer) -> Document:
        messages = list(answer.messages) or [{"role": "user", "content": answer.prompt}]
        return answer_document(self.tokenizer, messages, answer.text)


def open_reward(text: str, folder: str, malformed: float, dtype: str, mesh: Mesh, weight: float = 1.0) -> Reward:
    """The judges in `text`, `weight` times the reward model in `folder`, or their sum.

    Raises: ConfigError where there is neither, or the folder holds a language model.
    """
    judge = make_reward(text, malformed) if text else None
    if not folder:
        if judge is None:
            raise ConfigError("nothing is rewarded: give --reward_model=FOLDER, --reward=exact, or both")
        return judge
    model = read_model(folder, dtype, mesh)
    if not isinstance(model, ScalarModel):
        raise ConfigError(f"reward_model={folder} is a language model: train one with `tritium reward`")
    judges: dict[str, Reward] = {
        "reward_model": ModelReward(model.requires_grad_(False), load_tokenizer(folder, model))
    }
    judges |= {"reward": judge} if judge else {}
    return WeightedSum(judges, {"reward_model": weight, "reward": 1.0})
