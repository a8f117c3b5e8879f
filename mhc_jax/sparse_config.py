"""What DeepSeek Sparse Attention can be told, and the checks that need no other room."""

from dataclasses import dataclass
from typing import Literal

from mhc_jax.errors import UserError


@dataclass(frozen=True)
class SparseConfig:
    """DeepSeek Sparse Attention (DSA; arXiv 2512.02556, section 2.1): an indexer chooses the keys that each query attends to.

    Stages of the published recipe: `warmup` keeps attention dense and trains the indexer alone, everything else frozen; `sparse` attends to
    the chosen keys, the language-model loss training everything but the indexer. A later stage begins with `train.init_from`.
    """

    stage: Literal["warmup", "sparse"] = "sparse"
    index_heads: int = 64  # query heads of the indexer
    index_dim: int = 128  # per head, of which the first attention.rope_dim are rotated
    top_k: int = 2048  # keys that a query attends to; a multiple of 64 with granularity "page"
    granularity: Literal["token", "page"] = "token"  # page: 64 queries share whole pages of 64 keys, which suits a TPU
    query_chunk: int = 512  # queries whose indexer scores and chosen keys exist at a time


PAGE = 64  # tokens; of `pallas_kernels.visible`, which a config does not import


def check_sparse(sparse: SparseConfig, *, rope_dim: int, q_rank: int | None, qk_norm: bool, seq_len: int) -> None:
    """Raises UserError for the first field of `model.attention.sparse` that does not fit."""
    path = "model.attention.sparse"
    for name in ("index_heads", "index_dim", "top_k", "query_chunk"):
        if (value := getattr(sparse, name)) <= 0:
            raise UserError(f"{path}.{name} is {value}; it must be a positive finite number")
    if q_rank is None:
        raise UserError(
            f"{path} needs model.attention.q_rank: the indexer's queries are made from the query latent; set it, for example to 128"
        )
    if qk_norm:
        raise UserError(
            f"{path} cannot go with model.attention.qk_norm: sparse attention multiplies queries with the latent itself, and keys that are "
            "normalised head by head are no product of it; turn one of the two off"
        )
    if sparse.index_dim < rope_dim:
        raise UserError(f"{path}.index_dim is {sparse.index_dim}, less than model.attention.rope_dim = {rope_dim}; raise it")
    if sparse.top_k > seq_len:
        raise UserError(
            f"{path}.top_k is {sparse.top_k}, more than data.seq_len = {seq_len}: attention would be dense; lower it or raise data.seq_len"
        )
    for name in ("top_k", "query_chunk"):
        if sparse.granularity == "page" and (value := getattr(sparse, name)) % PAGE:
            raise UserError(f'{path}.{name} is {value}, no multiple of {PAGE}, which granularity "page" needs')
