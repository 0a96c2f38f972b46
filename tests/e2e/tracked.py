"""What trackers keep in files, read back: event files of TensorBoard, and what wandb writes offline."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

Curve = list[tuple[int, float]]
"""(step, value), in the order in which they stand in the files: nothing is merged, and nothing is sorted."""


def tensorboard_curves(folder: Path) -> dict[str, Curve]:
    """Tag -> its curve, over all event files of the folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found: dict[str, Curve] = defaultdict(list)
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value if event.HasField("summary") else ():
                if value.metadata.plugin_data.plugin_name == "scalars":
                    found[value.tag].append((event.step, float(make_ndarray(value.tensor).item())))
    return dict(found)


def wandb_records(folder: Path) -> list[Any]:
    """The records that wandb's offline runs in the folder hold, one run after the other."""
    from wandb.proto import wandb_internal_pb2 as wandb_internal

    records = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()[7:]):
            record = wandb_internal.Record()
            record.ParseFromString(data)
            records.append(record)
    return records


def wandb_curves(folder: Path) -> dict[str, Curve]:
    """Name -> its curve, over all offline runs in the folder."""
    found: dict[str, Curve] = defaultdict(list)
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                name, value = item.key or "/".join(item.nested_key), json.loads(item.value_json)
                if isinstance(value, int | float) and not name.startswith("_"):
                    found[name].append((record.history.step.num, float(value)))
    return dict(found)


def leveldb_records(data: bytes, header: int = 7, block: int = 32768) -> list[bytes]:
    """Records of LevelDB's log format, in which wandb writes: blocks of 32 KiB, the file's first 7 bytes counted to the first.

    https://github.com/google/leveldb/blob/main/doc/log_format.md: checksum (4 bytes), length (2), type (1: whole, 2: first,
    3: middle, 4: last part), then the data; what is left of a block that holds no header is zeros. A torn end is left out.
    """
    records, parts, at, offset = [], b"", 0, header
    while at + header <= len(data):
        if block - (at + offset) % block < header:
            at += block - (at + offset) % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind not in (1, 2, 3, 4) or at + header + length > len(data):
            break
        parts += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):
            records.append(parts)
            parts = b""
    return records
