"""What a model, a construction or a training run will take: parameters, memory and time, foretold
from the architecture and a measurement of a few seconds.
"""
