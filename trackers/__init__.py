"""Where what a step says is reported to. The table of trackers; a new one is a module and a line here."""

from __future__ import annotations

from trackers.base import Options, Tracker
from trackers.mlflow import MLflow
from trackers.tensorboard import TensorBoard
from trackers.wandb import Wandb

ALL: tuple[type[Tracker], ...] = (TensorBoard, Wandb, MLflow)
TRACKERS = {tracker.name: tracker for tracker in ALL}

__all__ = ["TRACKERS", "Options", "Tracker"]
