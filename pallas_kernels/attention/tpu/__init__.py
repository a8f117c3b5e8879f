"""Dense attention on TPU (Pallas, Mosaic).

forward      one pass over the blocks of keys of every block of queries
backward     one pass over the blocks of queries of every block of keys, for all gradients
blocks       what they share: sizes, the walk over blocks under the causal mask, masks, products
"""

from pallas_kernels.attention.tpu.backward import dense_attention_backward as dense_attention_backward
from pallas_kernels.attention.tpu.forward import dense_attention as dense_attention
