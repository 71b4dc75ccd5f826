"""Evaluation: metrics per domain and part in one pass over the images, and the predictions for single images."""

from gsdg.evaluation.evaluator import DomainMeans as DomainMeans
from gsdg.evaluation.evaluator import Evaluator as Evaluator
