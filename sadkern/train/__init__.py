"""Training: a thin layer over `transformers.Trainer`."""

from sadkern.data import SpanCollator, load_trajectories, prepare
from sadkern.train.config import SADConfig
from sadkern.train.trainer import SADTrainer

__all__ = ["SADConfig", "SADTrainer", "SpanCollator", "load_trajectories", "prepare"]
