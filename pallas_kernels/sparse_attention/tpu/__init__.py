"""One chunk of sparse attention on TPU (Pallas, Mosaic).

pages              and pages_backward: blocks of queries that share pages of keys
tokens             queries that have keys of their own; forward only, XLA has the backward pass
blocks             what they share: fetching a block's latents, masks
add                adding pages of gradients up in a fixed order
"""

from pallas_kernels.sparse_attention.tpu.pages import attend_pages as attend_pages
from pallas_kernels.sparse_attention.tpu.pages_backward import attend_pages_backward as attend_pages_backward
from pallas_kernels.sparse_attention.tpu.tokens import attend_tokens as attend_tokens
from pallas_kernels.sparse_attention.tpu.tokens import packed as packed
