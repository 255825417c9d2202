"""Attention in float64 NumPy, one query and one head at a time, from explicit lists of what is visible."""

import numpy as np


def attention(q, k, v, visible, sink=None):
    """q [rows, heads, dk], k [keys, kv_heads, dk], v [keys, kv_heads, dv], visible [rows, keys]: [rows, heads, dv]."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    rows, heads, dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros((rows, heads, v.shape[2]))
    for row in range(rows):
        seen = np.flatnonzero(visible[row])
        for head in range(heads):
            logits = k[seen, head // group] @ q[row, head] / np.sqrt(dim)
            top = logits.max() if sink is None else max(logits.max(), float(sink[head]))
            weights = np.exp(logits - top)
            total = weights.sum() + (0.0 if sink is None else np.exp(float(sink[head]) - top))
            out[row, head] = weights @ v[seen, head // group] / total
    return out
