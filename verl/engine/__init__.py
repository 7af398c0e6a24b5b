"""A model being trained: per-token numbers, updates, memory, checkpoints. Knows no PPO and no rollout."""

from verl.engine.checkpoint import CheckpointError
from verl.engine.engine import TrainEngine

__all__ = ["CheckpointError", "TrainEngine"]
