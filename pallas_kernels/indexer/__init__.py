"""The lightning indexer of DeepSeek Sparse Attention: scores, selection by them, and the losses that train it (arXiv 2512.02556).

reference    the specification in plain jnp
xla          scores and selection in plain XLA, for any shape and platform
pieces       queries chunk by chunk, keys block by block
select       from scores to selected tokens and pages
divergence   the losses' KL of a chunk; dense_loss and sparse_loss: both losses, with the gradients of the indexer alone
choose       which implementation runs
api          what a user calls
"""

from pallas_kernels.indexer.api import dense_indexer_loss, index_scores, select_pages, select_tokens, sparse_indexer_loss

__all__ = ["dense_indexer_loss", "index_scores", "select_pages", "select_tokens", "sparse_indexer_loss"]
