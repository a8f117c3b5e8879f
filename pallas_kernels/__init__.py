"""Kernels for TPU and GPU: arrays in, arrays out. Imports jax and numpy alone, and needs nothing of mhc_jax.

    case    what a case is: one kernel at one shape, and the bytes that it must move
    choose  which implementation of a family runs
    tpu     what the TPU kernels of all families share; gpu what those for GPUs share
    mhc     the residual streams of manifold-constrained hyper-connections: post, pre, and both at one seam
    engram_gate  what Engram looked up, added to every stream by a gate

Every family has the same parts: `reference` says what is computed, in plain jnp; `tpu`, `gpu` and `xla` compute it; `api` is what a
user calls; `cases` names real shapes for tests, cost and benchmarks.
"""
