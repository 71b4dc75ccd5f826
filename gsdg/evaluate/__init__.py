"""Evaluation: metrics per domain and part in one pass over the images, and the predictions for single images."""

from gsdg.evaluate.evaluator import DomainMeans as DomainMeans
from gsdg.evaluate.evaluator import Evaluator as Evaluator
