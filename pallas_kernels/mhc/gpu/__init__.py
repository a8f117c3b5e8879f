"""Pallas Mosaic GPU kernels for Hopper (H100, H200). Held to float64 and timed on an H200.

seam            what this package offers: post, pre, both at one seam, and their gradients
forward         the kernel that mixes, projects and reads streams; products with d_u
backward        the kernel that walks back through all of these
coefficients    gates and Sinkhorn, one token to a thread
tokens          tiles of tokens; pipelines, layouts and the device stand in pallas_kernels.gpu.launch

Everything is bound by memory, so what counts is bytes. In units of C elements of the streams' type for a token, the least that must be
moved (arguments read once, results written once) and what these kernels move:

                        least     moved          n = 4
    post                2n + 1    2n + 1         9 of 9
    post backward       3n + 2    3n + 2         14 of 14
    pre                 n + 1     2n + 1         5 of 9
    pre backward        2n + 1    3n + 2         9 of 14
    seam                2n + 2    3n + 2         10 of 14
    seam backward       3n + 3    4n + 5         15 of 21

The second pass of pre and of the seam reads the streams for u, once all columns have said what h is: 64 tokens of 4 * 2560 are 1.3 MB, and
shared memory has 227 KB. With reads="previous" there is no second pass, and the least is moved. The first pass of a backward is n + 1 or n
+ 2 C for products with d_u, before gates can be walked back.

Besides, at n = 4, C = 2560, bfloat16, 8192 tokens, where C elements are 5.1 KB: 0.5 KB a token of products with phi; backward 3.2 KB
(post) or 6.4 KB (seam) of programs' shares of the coefficients' gradients, and 1 KB of the gradient of phi. From the second-level cache,
20 KB a token of phi forward and 19 KB of phi and coefficients backward. `saved` is 100 bytes.
"""

from pallas_kernels.mhc.gpu.coefficients import misfit, sinkhorn, sinkhorn_backward
from pallas_kernels.mhc.gpu.seam import post, post_backward, post_pre, post_pre_backward, pre, pre_backward

__all__ = ["misfit", "post", "post_backward", "post_pre", "post_pre_backward", "pre", "pre_backward", "sinkhorn", "sinkhorn_backward"]
