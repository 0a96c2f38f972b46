"""How a job becomes processes. The table of launchers; a new one is a module and a line here."""

from __future__ import annotations

from launch.base import Launcher
from launch.deepspeed import DeepSpeed
from launch.local import Local
from launch.srun import Srun
from launch.torchrun import Torchrun

ALL: tuple[Launcher, ...] = (Local(), Torchrun(), DeepSpeed(), Srun())
LAUNCHERS = {launcher.name: launcher for launcher in ALL}

__all__ = ["LAUNCHERS", "Launcher"]
