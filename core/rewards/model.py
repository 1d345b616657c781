"""The judges that a stage asks for: what its `reward` says, its reward model, and those that filter its pairs."""

from dataclasses import dataclass

import numpy as np

from tritium.core.batch import Convert, Group
from tritium.core.checkpoint import model_folder
from tritium.core.config import ConfigError, check_ranges, opt
from tritium.core.formats import RecordError, preference
from tritium.core.rewards import Answer, Reward, Score, scores
from tritium.core.rewards.make import WeightedSum, make_reward
from tritium.core.rewards.scorer import ModelReward, open_scorer
from tritium.core.select import agreed_pairs
from tritium.model.adapters import twin
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh


def open_reward(
    text: str,
    folder: str,
    malformed: float,
    dtype: str,
    mesh: Mesh,
    weight: float = 1.0,
    policy: Transformer | None = None,
) -> Reward:
    """The judges in `text`, `weight` times the reward model in `folder`, or their sum. A reward model that is an
    adapter on the base of `policy`, which is one too, shares it.

    Raises: ConfigError where there is neither, or the folder holds a language model.
    """
    judge = make_reward(text, malformed) if text else None
    if not folder:
        if judge is None:
            raise ConfigError("nothing is rewarded: give --reward_model=FOLDER, --reward=exact, or both")
        return judge
    scorer = ModelReward(folder, dtype, mesh)
    if policy is not None and (shared := twin(policy, model_folder(folder))):
        scorer.model = shared.requires_grad_(False)
    judges: dict[str, Reward] = {"reward": judge} if judge else {}  # first: it says which answers are right
    judges |= {"reward_model": scorer}
    return WeightedSum(judges, {"reward_model": weight, "reward": 1.0})


@dataclass
class FilterConfig:
    """Which pairs are left out as noise: those that reward models find too close, or disagree on."""

    models: list[str] = opt([], "folders of reward models that vote on the pairs (empty: keep all pairs)")
    margin: float = opt(0.0, "keep a pair only if the chosen answer's mean score is better by more than this")
    agreement: float = opt(0.5, "least fraction of the models that must prefer the chosen answer", least=0, most=1)

    def __post_init__(self):
        check_ranges(self, "filter.")
        if not self.models and (self.margin, self.agreement) != (0.0, 0.5):
            raise ConfigError("filter.margin and filter.agreement are of the scores of filter.models: name some")

    def around(self, convert: Convert, dtype: str, mesh: Mesh) -> Convert:
        """`convert`, which raises RecordError for noise."""
        judges = [open_scorer(folder, dtype, mesh) for folder in self.models]

        def checked(record: dict) -> Group:
            prompt, *texts = preference(record)
            both = zip(texts, texts[::-1], strict=True)
            answers = [Answer((), text, reference=other, messages=prompt) for text, other in both]
            given = [scores(judge, answers) for judge in judges]  # [models, 2]
            if not all(isinstance(score, Score) for row in given for score in row):
                raise RecordError("a pair that a reward model of filter.models can't read")
            margins = np.array([[a.value - b.value] for a, b in given])  # [models, 1]
            if not len(agreed_pairs(margins, self.margin, self.agreement)):
                raise RecordError("a pair that the reward models of filter.models find too close, or disagree on")
            return convert(record)

        return checked if judges else convert
