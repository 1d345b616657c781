"""What is minimised, a formula each; the protocol is in base.py.

likelihood.py   cross-entropy, DFT, unlikelihood
reward.py       Bradley-Terry, comparisons, scores, steps, Plackett-Luce
preference.py   DPO, IPO, DPOP, hinge, APO, ORPO, SimPO, CPO, SLiC, RRHF (a function each, in `LOSSES`), KTO
policy.py       GRPO, Dr. GRPO, DAPO, GSPO, RLOO, ReMax, REINFORCE++ (`ALGORITHMS`), PPO
distill.py      KL and JSD to a teacher, the dual-level loss
"""
