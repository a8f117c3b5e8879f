"""Multi-head latent attention one query at a time, float64 NumPy, written from DeepSeek-V2/V3 (arXiv 2405.04434, 2412.19437)."""

import numpy as np

from oracles.rope import rotate


def normed(x, weight, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * weight


def mla(x, p, positions, segments, *, nope, rope, value, kv_rank, eps, frequencies, temperature, qk_scales=None):
    """x [S, C] of one sequence -> output [S, C] and the largest logit. `p` maps parameter names to arrays."""
    length, heads = len(x), p["out"].shape[0]
    scale = temperature / np.sqrt(nope + rope)
    q, k_rope, k_nope, v = [], [], [], []
    for t in range(length):
        if "query" in p:
            q.append([x[t] @ p["query"][:, h] for h in range(heads)])
        else:
            latent = normed(x[t] @ p["query_down"], p["query_norm"], eps)
            q.append([latent @ p["query_up"][:, h] for h in range(heads)])
        both = x[t] @ p["latent"]
        c = normed(both[:kv_rank], p["latent_norm"], eps)
        shared = both[kv_rank:]
        if qk_scales is not None:
            shared = normed(shared, qk_scales[1, nope:], eps)
        k_rope.append(rotate(shared, positions[t], frequencies))
        kv = [c @ p["expand"][:, h] for h in range(heads)]
        k_nope.append([normed(a[:nope], qk_scales[1, :nope], eps) if qk_scales is not None else a[:nope] for a in kv])
        v.append([a[nope : nope + value] for a in kv])
    out, largest = np.zeros((length, p["out"].shape[2])), -np.inf
    for t in range(length):
        for h in range(heads):
            q_nope, q_rope = q[t][h][:nope], q[t][h][nope:]
            if qk_scales is not None:
                q_nope, q_rope = normed(q_nope, qk_scales[0, :nope], eps), normed(q_rope, qk_scales[0, nope:], eps)
            q_rope = rotate(q_rope, positions[t], frequencies)
            seen = [s for s in range(t + 1) if segments[s] == segments[t]]
            logits = np.array([scale * (q_nope @ k_nope[s][h] + q_rope @ k_rope[s]) for s in seen])
            largest = max(largest, logits.max())
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            out[t] += sum(w * v[s][h] for w, s in zip(weights, seen)) @ p["out"][h]
    return out, largest
