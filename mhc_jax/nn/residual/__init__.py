"""How sublayers are joined. The socket, its parts, and what all parts share.

    streams      flat streams [B, S, n*C]: expand, read, write, collapse
    socket       `Connection`: what a part must provide, and the list of parts
    hc           Hyper-Connections, dynamic and static                         (arXiv 2409.19606)
    mhc          mHC, and its control with H_res = I                           (arXiv 2512.24880)
    sinkhorn     the projection onto doubly stochastic matrices

A part turns streams into coefficients; it never sees what the sublayer computes.
"""
