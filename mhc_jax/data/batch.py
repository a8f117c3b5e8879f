"""What a batch is, and the arithmetic on plain arrays that makes one. Reading, order and packing are the pipeline's.

A batch is a dictionary of int32 arrays [batch_size, seq_len]:

    tokens       input token ids; 0 in padding
    targets      the next token of the same document; IGNORED in padding
    segment_ids  number of the document inside the row, from 1; 0 in padding
    positions    from 0 at the start of each document, and of its part in this row where it goes on from the row before; 0 in padding

With Engram (docs/engram.md) there is also

    engram_rows  int32 [batch_size, seq_len, layers, heads]: the row of the layer's table that each head of each token reads

A document of L tokens (the last is end-of-text) gives L - 1 pairs of a token and its target, and the pairs are what is packed. So the
last token of a row has its true target although that token is an input of the next row, end-of-text is only ever a target, and no
target lies in another document.
"""

from typing import Any

import numpy as np
from jaxtyping import Int32

IGNORED = -1  # target that the loss leaves out

Batch = dict[str, Int32[np.ndarray, "batch seq_len *more"]]


def token_pairs(record: bytes, dtype: str) -> dict[str, Int32[np.ndarray, " pairs"]]:
    """The inputs (`tokens`) and `targets` of one document, from its record."""
    document = np.frombuffer(record, dtype).astype(np.int32)
    return {"tokens": document[:-1], "targets": document[1:]}


def from_packed(packed: dict[str, Any]) -> Batch:
    """A batch, from rows in which Grain has packed the pairs of documents. Grain pads everything with 0."""
    segment_ids = packed["tokens_segment_ids"]
    return {
        "tokens": packed["tokens"],
        "targets": np.where(segment_ids == 0, np.int32(IGNORED), packed["targets"]),
        "segment_ids": segment_ids,
        "positions": packed["tokens_positions"],
    }
