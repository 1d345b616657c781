"""The judge that a stage asks for: what its `reward` says, and its reward model."""

from tritium.core.config import ConfigError
from tritium.core.rewards import Reward
from tritium.core.rewards.make import WeightedSum, make_reward
from tritium.core.rewards.scorer import ModelReward
from tritium.parallel.mesh import Mesh


def open_reward(text: str, folder: str, malformed: float, dtype: str, mesh: Mesh, weight: float = 1.0) -> Reward:
    """The judges in `text`, `weight` times the reward model in `folder`, or their sum.

    Raises: ConfigError where there is neither, or the folder holds a language model.
    """
    judge = make_reward(text, malformed) if text else None
    if not folder:
        if judge is None:
            raise ConfigError("nothing is rewarded: give --reward_model=FOLDER, --reward=exact, or both")
        return judge
    judges: dict[str, Reward] = {"reward_model": ModelReward(folder, dtype, mesh)}
    judges |= {"reward": judge} if judge else {}
    return WeightedSum(judges, {"reward_model": weight, "reward": 1.0})
