"""How sublayers are joined. The socket, its parts, and what all parts share.

    streams      flat streams [B, S, n*C]: what is pending between sublayers, expand, collapse
    socket       `Connection`: what a part must provide
    hc           Hyper-Connections, dynamic and static                         (arXiv 2409.19606)
    mhc          mHC, and its control with H_res = I                           (arXiv 2512.24880)
    projected    `Projected`: mHC with another way from logits to H_res
    mhc_lite     H_res a convex combination of permutations                    (arXiv 2601.05732)
    kromhc       H_res a Kronecker product of small matrices                   (arXiv 2601.21579)
    kinds        which part a name means, and `register`, which adds one

A part turns streams into coefficients; it never sees what the sublayer computes. The arithmetic is that of `pallas_kernels.mhc`.
"""
