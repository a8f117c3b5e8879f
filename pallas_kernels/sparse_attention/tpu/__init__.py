"""One chunk of sparse attention on TPU (Pallas, Mosaic).

pages              and pages_backward: blocks of queries that share pages of keys
blocks             what they share: fetching a block's latents, masks
add                adding pages of gradients up in a fixed order
"""

from pallas_kernels.sparse_attention.tpu.pages import attend_pages as attend_pages
from pallas_kernels.sparse_attention.tpu.pages_backward import attend_pages_backward as attend_pages_backward
