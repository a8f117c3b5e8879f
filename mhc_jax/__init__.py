"""Manifold-constrained hyper-connections (mHC) and their relatives in JAX.

The rooms, ground floor first (each imports only rooms above its own line):

    config        what a run is: frozen dataclasses, validated together
    files         writing files whole, and the one exception for users (errors)
    parallel      the mesh, and where arrays lie on it
    nn            the maths as pure functions on arrays, and the modules that hold parameters
    data          text to packed batches, with Grain
    train         step, optimizer, checkpoints, metrics, the loop
    configs       the named configurations
    experiments   questions: lists of runs, and their reports
    cli           the command `mhc-jax`
"""

__version__ = "0.1.0"
