"""The judge that a stage asks for: what its `reward` says, and its reward model."""

from tritium.core.checkpoint import model_folder
from tritium.core.config import ConfigError
from tritium.core.rewards import Reward
from tritium.core.rewards.make import WeightedSum, make_reward
from tritium.core.rewards.scorer import ModelReward
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
    judges: dict[str, Reward] = {"reward_model": scorer}
    judges |= {"reward": judge} if judge else {}
    return WeightedSum(judges, {"reward_model": weight, "reward": 1.0})
