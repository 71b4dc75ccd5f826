"""What loggers have written for a run, read back with their own libraries."""

from __future__ import annotations

import struct
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

Numbers = list[tuple[int, str, float]]  # (step, name, value)
LIBRARIES = {"csv": "pandas", "tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
INSTALLED = [name for name, library in LIBRARIES.items() if find_spec(library) and find_spec(library).origin]
NEEDS = {name: pytest.mark.skipif(name not in INSTALLED, reason="pip install 'gsdg[loggers]'") for name in LIBRARIES}


def csv_numbers(folder: Path) -> Numbers:
    table = pd.read_csv(folder / "metrics.csv")
    return list(table[["step", "name", "value"]].itertuples(index=False, name=None))


def tensorboard_numbers(folder: Path) -> Numbers:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (title,) = (folder / "tensorboard").iterdir()
    events = EventAccumulator(str(title), size_guidance={"scalars": 0}).Reload()
    return [(event.step, tag, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]


def mlflow_run(folder: Path) -> tuple[Any, Any]:
    """(client, the only run of the database)."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent}/.mlflow.db")
    (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return client, found


def mlflow_numbers(folder: Path) -> Numbers:
    client, found = mlflow_run(folder)
    return [
        (metric.step, name, metric.value)
        for name in found.data.metrics
        for metric in client.get_metric_history(found.info.run_id, name)
    ]


def wandb_records(folder: Path) -> list:
    """The records of the only offline run. W&B's own process may write the last ones after `finish` has returned."""
    end = time.monotonic() + 20
    while not (records := _wandb_records(folder)) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < end, "W&B has not written its last record"
        time.sleep(0.1)
    return records


def _wandb_records(folder: Path) -> list:
    """What its file holds by now: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    content, place, payload, records = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no record header begins in the last bytes of a block
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", content, place)
        payload += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            records.append(Record.FromString(payload))
            payload = b""
    return records


def wandb_numbers(folder: Path) -> Numbers:
    numbers = []
    for record in wandb_records(folder):
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        numbers += [(int(items["_step"]), key, float(value)) for key, value in items.items() if not key.startswith("_")]
    return numbers


READ = {"csv": csv_numbers, "tensorboard": tensorboard_numbers, "mlflow": mlflow_numbers, "wandb": wandb_numbers}
