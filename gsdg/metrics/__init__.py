"""The metrics of a classifier, and the frame of its predictions. Does not import torch, because tables need it too."""

from gsdg.metrics.definitions import ACCURACY as ACCURACY
from gsdg.metrics.definitions import METRICS as METRICS
from gsdg.metrics.definitions import Metric as Metric
from gsdg.metrics.definitions import Outcomes as Outcomes
from gsdg.metrics.definitions import check_metrics as check_metrics
