"""What is minimised, by kind: likelihood, reward, preference, policy. The protocol is in base.py."""

from tritium.core.objectives.base import (
    Loss,
    Metric,
    Networks,
    Objective,
    Term,
    sequence_sum,
    supervised,
    supervised_logprob,
)
from tritium.core.objectives.distill import Distill, DualLevel
from tritium.core.objectives.likelihood import CrossEntropy, DynamicFineTuning, Unlikelihood
from tritium.core.objectives.policy import ALGORITHMS, PPO, PolicyGradient
from tritium.core.objectives.preference import KTO, PairOptions, Preference
from tritium.core.objectives.reward import (
    Comparison,
    Listwise,
    Pairwise,
    Process,
    RewardObjective,
    Scoring,
    plackett_luce,
)
