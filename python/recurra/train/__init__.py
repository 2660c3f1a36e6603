"""Training of language models: what ``recurra train`` runs."""

from recurra.train.options import TrainOptions
from recurra.train.trainer import Trainer

__all__ = ["TrainOptions", "Trainer"]
