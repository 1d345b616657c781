"""What is minimised, by kind: likelihood, reward, preference, policy, distill. The protocol is in base.py."""
