"""Measurements of a model on text: pure functions, no files written."""

from moesaic.measure.load import LoadReport, measure_load
from moesaic.measure.loss import held_out_loss

__all__ = ["LoadReport", "held_out_loss", "measure_load"]
