"""Activations of experts and their derivatives inside plain Triton kernels, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return silu, gelu or gelu_tanh of x (float32) and the derivative there.

    Each is x times a function that rises from 0 to 1: the logistic function, the normal
    distribution, or the logistic function of a cubic, since (1 + tanh(u)) / 2 is that of 2u.
    """
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        act = x * s
        slope = s + act * (1.0 - s)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        act = x * s
        slope = s + act * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        s = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        act = x * s
        slope = s + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    return act, slope
