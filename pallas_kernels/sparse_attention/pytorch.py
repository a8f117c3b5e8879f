"""The same work in plain PyTorch on the GPU that is here, for measuring beside the kernels: latents gathered, two products, a softmax.

What a user of PyTorch would write without kernels of their own: bfloat16 products, scores in float32, chunks of queries that fit memory.
"""

from collections.abc import Callable
from typing import Any

from pallas_kernels.visible import PAGE

CHUNK = 64  # queries whose latents are gathered at once: 64 x 2048 rows of 1,152 bytes are 151 MB


def build(pages: bool, direction: str, shapes: tuple[Any, ...], index: Any, scale: float) -> Callable[[], Any]:
    """What to time: `shapes` are the case's first four arguments, `index` [B, lists, chosen] names tokens or pages.

    Backward is the gradient alone, of an output that is kept.
    """
    import torch

    def normal(shape: tuple[int, ...]) -> Any:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=direction == "backward")

    q_nope, q_rope, weights, latent = shapes
    arrays = [normal(x.shape) for x in (q_nope, q_rope, *weights, latent)]
    rows = torch.as_tensor(index, device="cuda").long()
    if pages:
        rows = (rows[..., None] * PAGE + torch.arange(PAGE, device="cuda")).flatten(2)
        rows = rows.repeat_interleave(PAGE, dim=1)

    def attend(q_nope: Any, q_rope: Any, key_up: Any, value_up: Any, latent: Any) -> Any:
        batch, queries = q_nope.shape[:2]
        rank = key_up.shape[0]
        sequence = torch.arange(batch, device="cuda")[:, None, None]
        out = []
        for start in range(0, queries, CHUNK):
            part = slice(start, start + CHUNK)
            q = torch.cat([torch.einsum("bshd,khd->bshk", q_nope[:, part], key_up), q_rope[:, part]], dim=-1)
            chosen = latent[sequence, rows[:, part]]
            p = torch.softmax((q @ chosen.transpose(-1, -2)).float() * scale, dim=-1).to(q.dtype)
            out.append(torch.einsum("bshk,khv->bshv", p @ chosen[..., :rank], value_up))
        return torch.cat(out, dim=1)

    if direction == "forward":
        return lambda: attend(*arrays)
    out = attend(*arrays)
    d_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, arrays, d_out, retain_graph=True)
