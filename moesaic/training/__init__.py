"""Training: continual pre-training and training from scratch, one process for now.

The room is called training because `moesaic.train` is the function of the public API.
"""
