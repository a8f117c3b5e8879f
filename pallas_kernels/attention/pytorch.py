"""PyTorch's own attention on the GPU that is here, for measuring beside the kernels: `scaled_dot_product_attention`, which takes cuDNN's
kernel or FlashAttention's where one fits these widths, causal, one document.
"""

from collections.abc import Callable
from typing import Any


def build(direction: str, heads: int, length: int, width: int, value: int, scale: float) -> Callable[[], Any]:
    """What to time, for queries and keys of `width` columns, the rotated ones among them. Backward is the gradient alone."""
    import torch

    def normal(columns: int) -> Any:
        shape = (1, heads, length, columns)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=direction == "backward")

    q, k, v = normal(width), normal(width), normal(value)

    def attend() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    if direction == "forward":
        return attend
    out = attend()
    d_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)
