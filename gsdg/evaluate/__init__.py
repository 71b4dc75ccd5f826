"""`python -m gsdg.evaluate RUN...`: metrics, predictions for single images, and figures of finished runs.

`gsdg.evaluation` makes the passes over the images; the trainer uses it too.
"""
