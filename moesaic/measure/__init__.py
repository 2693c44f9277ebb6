"""Measurements of a model on text: pure functions, no files written."""


from moesaic.measure.loss import held_out_loss

__all__ = ["held_out_loss"]
