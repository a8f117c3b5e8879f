"""DeepSeekMoE one token and one expert at a time, float64 NumPy, written from DeepSeek-V3 (arXiv 2412.19437, Eq. 12-20)."""

import numpy as np


def swiglu(x, gate, up, down):
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def route(x, router, bias, *, top_k, groups, top_groups, scaling):
    """One token: chosen experts in falling order of biased affinity, their weights, and all affinities."""
    affinity = 1 / (1 + np.exp(-(x @ router)))
    biased = affinity + bias
    size = len(biased) // groups
    score = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    open_groups = sorted(range(groups), key=lambda g: -score[g])[:top_groups]
    candidates = [e for g in open_groups for e in range(g * size, (g + 1) * size)]
    chosen = sorted(candidates, key=lambda e: -biased[e])[:top_k]
    total = sum(affinity[e] for e in chosen)
    return chosen, [scaling * affinity[e] / total for e in chosen], affinity


def moe(x, p, bias, **routing):
    """x [T, C] -> output and tokens per expert. `p` maps names to arrays; gate and up are the halves of `inner`."""
    out, load = np.zeros_like(x), np.zeros(p["router"].shape[1], int)
    half = p["inner"].shape[-1] // 2
    for t in range(len(x)):
        for expert, weight in zip(*route(x[t], p["router"], bias, **routing)[:2]):
            load[expert] += 1
            out[t] += weight * swiglu(x[t], p["inner"][expert, :, :half], p["inner"][expert, :, half:], p["out"][expert])
        if "shared_inner" in p:
            half_s = p["shared_inner"].shape[-1] // 2
            out[t] += swiglu(x[t], p["shared_inner"][:, :half_s], p["shared_inner"][:, half_s:], p["shared_out"])
    return out, load
