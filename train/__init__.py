"""Supervised stages: each file is one command, `python -m train.STAGE`."""
