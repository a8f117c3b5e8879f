"""Which implementation of sparse attention runs. What all families have in common stands in `pallas_kernels.choose`."""

import importlib

import jax
import jax.numpy as jnp

from pallas_kernels.case import Implementation
from pallas_kernels.choose import LANES, Kernels, target
from pallas_kernels.choose import choose as choose_of
from pallas_kernels.visible import PAGE, Selected

FAMILY = "sparse_attention"
MOST_TOKENS = 4096  # of a query: two buffers of rows of 2 KiB, in VMEM
MOST_HEADS = 256  # where single tokens are chosen: their gradients take more VMEM with more
HEADS = 16  # the TPU kernels take multiples of it: a tile of bfloat16 rows


def choose(
    q_rope: jax.Array, latent: jax.Array, rank: int, selected: Selected, name: Implementation | None, interpret: bool, *, pages: bool
) -> Kernels:
    """The implementation of this name; without one, the platform's kernels where the arrays fit them and XLA where they do not.

    Raises:
      ValueError: the name is unknown, or its kernels cannot run here or cannot take these arrays.
    """

    def limit(name: str) -> str | None:
        if name == "gpu":
            return importlib.import_module(f"pallas_kernels.{FAMILY}.gpu").misfit(latent, rank, q_rope.shape[2])
        return _tpu_misfit(q_rope, latent, rank, selected.index.shape[-1], pages)

    # The TPU kernels for single tokens first bring all latents into rows that can be moved: too much for a token that is decoded.
    few = not pages and q_rope.shape[1] * selected.index.shape[-1] < latent.shape[1]
    if name is None and few and target()[0] == "tpu":
        name = "xla"
    return choose_of(FAMILY, name, interpret, None, limit=limit)


def _tpu_misfit(q_rope: jax.Array, latent: jax.Array, rank: int, chosen: int, pages: bool) -> str | None:
    _, length, heads, _ = q_rope.shape
    if latent.dtype != jnp.bfloat16:
        return f"the latents are {latent.dtype}; the TPU kernels take bfloat16"
    if rank % LANES or heads % HEADS:
        return f"K is {rank} and H {heads}; the TPU kernels need multiples of {LANES} and {HEADS}"
    if not pages and rank % (2 * LANES):
        return f"K is {rank}; the TPU kernel for single tokens needs a multiple of {2 * LANES}"
    if not pages and chosen > MOST_TOKENS:
        return f"{chosen} tokens are chosen; the TPU kernel for single tokens takes up to {MOST_TOKENS}"
    if not pages and heads > MOST_HEADS:
        return f"H is {heads}; the TPU kernels for single tokens take up to {MOST_HEADS}"
    if not pages:
        return None
    if length < PAGE:
        return f"there are {length} queries; the TPU kernels take blocks of {PAGE}"
    from pallas_kernels.sparse_attention.tpu.blocks import vmem_misfit  # Pallas is imported where it is used

    return vmem_misfit(heads, latent.shape[-1], chosen)
