"""Scoring a checkpoint by lmms-eval; scripts/evaluate.sh starts it."""
