"""What a config costs before it runs: arithmetic from its numbers, and what compilers say of its training step.

    attention  what dense and sparse attention cost over position
    flops      FLOPs of a token by part, in training and in decoding; bytes of its cache
    traffic    bytes that residual streams move, rows that Engram reads
    v4         the same counts for DeepSeek-V4, whose attention this library does not have
    cost       chips; hours and dollars of a training run
    serving    the roofline of prefill and decoding

and for `mhc-jax plan` (docs/plan.md)

    topologies   TPU slices: shapes, memory, links
    compile      the step compiled for a machine that is not here
    model        the modelled time of what came out, with
    parts        which part of the network an operation belongs to
    products     FLOPs of matrix products
    collectives  what moves between chips, and how long that takes
    plan, table  the figures of a residual kind, and the table of several

What is measured or drawn is elsewhere.
"""
