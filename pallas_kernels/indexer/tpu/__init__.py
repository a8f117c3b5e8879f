"""The indexer on TPU (Pallas, Mosaic).

tile      scores of a few queries and keys, all heads added up in registers
scores    the scores of a chunk of queries
pages     their maxima over pages, without the scores themselves ever reaching HBM
"""

from pallas_kernels.indexer.tpu.pages import page_scores as page_scores
from pallas_kernels.indexer.tpu.scores import index_scores as index_scores
from pallas_kernels.indexer.tpu.select import top_indices as top_indices
