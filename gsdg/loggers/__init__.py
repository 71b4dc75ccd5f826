"""Loggers: callbacks that send the records of a run somewhere else. One file each; base.py says what a logger is."""

from gsdg.loggers.base import Logger as Logger
from gsdg.loggers.csv_file import CSV as CSV
from gsdg.loggers.mlflow_run import MLflow as MLflow
from gsdg.loggers.tensorboard_events import TensorBoard as TensorBoard
from gsdg.loggers.wandb_run import WandB as WandB
