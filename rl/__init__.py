"""Reinforcement learning from feedback: each stage is one command, `python -m rl.STAGE`."""
