"""MLflow: each run is a run of an experiment, with its config as parameters. A resumed run goes on in the same one."""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from gsdg.callbacks import WatchedRun
from gsdg.loggers.base import Logger, id_of_run, require

STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# Unless the user has set them. By default MLflow waits four minutes for a server that does not answer.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
MOST_PARAMETERS = 100  # of one request
LONGEST_PARAMETER = 500  # characters, of the older servers; more is cut off


class MLflow(Logger):
    """Sends metrics and parameters. Steps that the run has in MLflow already are not sent again.

    Args:
        experiment: name; created if it does not exist.
        tracking_uri: of the server or database; None: MLFLOW_TRACKING_URI, else .mlflow.db in runs_dir.
    """

    def __init__(self, *, experiment: str, tracking_uri: str | None) -> None:
        require("mlflow", "mlflow")
        self.experiment, self.tracking_uri = experiment, tracking_uri

    def open(self, run: WatchedRun) -> None:
        for variable, value in ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        mlflow: Any = import_module("mlflow")
        local = f"sqlite:///{run.folder.absolute().parent / '.mlflow.db'}"
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        self.run_id = id_of_run(run.folder, f"mlflow {self.experiment} {uri}", lambda: self._create(run))
        self.client.update_run(self.run_id, status="RUNNING")
        self.sent = self._steps_sent()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        entities: Any = import_module("mlflow.entities")
        now = int(1000 * time.time())
        named = {valid_name(name): value for name, value in values.items()}
        new = {name: value for name, value in named.items() if step not in self.sent[name]}
        metrics = [entities.Metric(name, value, now, step) for name, value in new.items()]
        self.client.log_batch(self.run_id, metrics=metrics)
        for name in new:
            self.sent[name].add(step)

    def close(self, state: str) -> None:
        self.client.set_terminated(self.run_id, STATUS[state])

    def _create(self, run: WatchedRun) -> str:
        """A new run with the config as parameters. Returns MLflow's id of it."""
        entities: Any = import_module("mlflow.entities")
        known = self.client.get_experiment_by_name(self.experiment)
        experiment_id = known.experiment_id if known else self.client.create_experiment(self.experiment)
        tags = {"gsdg.folder": str(run.folder.absolute())}
        run_id = self.client.create_run(experiment_id, run_name=f"{run.title}_{run.folder.name}", tags=tags).info.run_id
        texts = {valid_name(key): str(value)[:LONGEST_PARAMETER] for key, value in leaves(run.config)}
        parameters = [entities.Param(key, text) for key, text in texts.items()]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            self.client.log_batch(run_id, params=parameters[first : first + MOST_PARAMETERS])
        return run_id

    def _steps_sent(self) -> defaultdict[str, set[int]]:
        """{metric: the steps that the run has in MLflow}."""
        names = self.client.get_run(self.run_id).data.metrics
        histories = {name: self.client.get_metric_history(self.run_id, name) for name in names}
        return defaultdict(set, {name: {metric.step for metric in history} for name, history in histories.items()})


def valid_name(name: str) -> str:
    """The name with the code of each character that MLflow refuses: `accuracy/+90%/in` -> `accuracy/_2b_90_25_/in`."""
    return re.sub(r"[^\w./ -]", lambda match: f"_{ord(match[0]):x}_", name)


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value of a config."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
