"""The experts layer out of Triton kernels: forward and backward on sorted rows."""
from __future__ import annotations
import torch
from moesaic.kernels.triton import products
from moesaic.kernels.triton.combine import combine, weight_gradient
from moesaic.kernels.triton.metadata import Routing, route
from moesaic.kernels.triton.products import Launch

DEFAULT = {"up": Launch(256, 4), "down": Launch(256, 3), "dact": Launch(256, 4), "dx": Launch(256, 3),
           "dup": Launch(256, 3), "ddown": Launch(256, 3)}

def forward(x, w1, w2, ids, w, launches=DEFAULT, keep_h=True):
    routing = route(ids, w, experts=w1.shape[0], tile_rows=128)
    a, h = products.up(x, w1, routing, launches["up"], keep_h=keep_h)
    y = products.rows(a, w2, routing, launches["down"], transposed=True)
    out = combine(y, routing.inverse_N, torch.empty_like(x), weights_TK=w)
    return out, h, routing

def backward(grad, x, w1, w2, w, h, routing, launches=DEFAULT):
    dh, wa, partial = products.activation_gradient(grad, w2, h, routing, launches["dact"])
    dw = weight_gradient(partial, routing.inverse_N, torch.empty_like(w))
    dw2 = products.outer(grad, wa, routing, launches["ddown"])
    del wa
    rows = products.rows(dh, w1, routing, launches["dx"], transposed=False)
    dx = combine(rows, routing.inverse_N, torch.empty_like(x))
    del rows
    dw1 = products.outer(x, dh, routing, launches["dup"], transposed=True)
    return dx, dw1, dw2, dw
