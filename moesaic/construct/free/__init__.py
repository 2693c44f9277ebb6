"""Mixtures of experts without training: split, route, weight and refit a dense model, layer by
layer, in closed form. `moesaic.construct.pipeline` puts the parts together.
"""
