"""One chunk of sparse attention on TPU (Pallas, Mosaic).

pages              and pages_backward: blocks of queries that share pages of keys
tokens             and tokens_backward: queries that have keys of their own
blocks             what kernels of pages share: fetching a block's latents, masks
rows               what kernels of tokens share: fetching a query's latents
add                adding gradients of pages up in a fixed order
scatter            the same of single tokens
"""

from pallas_kernels.sparse_attention.tpu.pages import attend_pages as attend_pages
from pallas_kernels.sparse_attention.tpu.pages_backward import attend_pages_backward as attend_pages_backward
from pallas_kernels.sparse_attention.tpu.rows import packed as packed
from pallas_kernels.sparse_attention.tpu.scatter import gradient_of as gradient_of
from pallas_kernels.sparse_attention.tpu.scatter import sum_of as sum_of
from pallas_kernels.sparse_attention.tpu.tokens import attend_tokens as attend_tokens
from pallas_kernels.sparse_attention.tpu.tokens_backward import attend_tokens_backward as attend_tokens_backward
