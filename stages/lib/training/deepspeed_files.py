"""DeepSpeed's checkpoint files, read without running any code that may stand in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

HELD_BY_CHECKPOINTS = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
"""All that DeepSpeed's own checkpoints hold beside tensors and plain values; whatever else a file names is refused."""


def load_data(path: Path | str, map_location: Any = "cpu", **options: Any) -> Any:
    """What `torch.save` wrote to `path`, if it is tensors, plain values and what DeepSpeed puts beside them.

    Raises `pickle.UnpicklingError`, `RuntimeError` or another error of torch's where it is not.
    """
    with torch.serialization.safe_globals(HELD_BY_CHECKPOINTS):
        return torch.load(path, map_location=map_location, weights_only=True, **options)


class DataOnly(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's way to its files, but for code: an unpickler that makes data alone."""

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True  # DeepSpeed's own default is torch's old format, which cannot be mapped

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_data(path, map_location)
