"""Batches of packed documents for training and evaluation, with Grain. What a batch is: batch.

Documents are shuffled, dealt to processes, read ahead by threads and worker processes, then concatenated and cut into rows. Packing comes
last and in this process, so that neither threads nor workers change what the batches are.
"""

from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from mhc_jax.data.batch import Batch, from_packed, token_pairs
from mhc_jax.data.prepared import Prepared
from mhc_jax.errors import UserError

READ_AHEAD = 16  # documents for each thread


def training_batches(
    prepared: Prepared,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    read_threads: int = 4,
    workers: int = 0,
    repeat: bool = True,
) -> grain.DatasetIterator[Batch]:
    """Batches of training text: every epoch all documents in a new order that depends on the seed, each in one process.

    The state that `get_state` returns is plain data that survives JSON; after `set_state` the iterator goes on bit for bit. It fits an
    iterator that was made with the same arguments.

    Args:
      prepared: the tokenised corpus.
      seq_len: tokens of a row.
      batch_size: rows of a batch of this process.
      seed: of the order of documents, below 2**32.
      process_index: which share of the documents to read.
      process_count: number of such shares.
      read_threads: threads that read ahead, in each worker.
      workers: processes that read ahead; 0 reads in this one.
      repeat: whether to go on after one epoch. If not, the last batch is filled up with padding.

    Raises:
      UserError: there are fewer documents than processes, or less text than one row.
    """
    if process_count > prepared.train_documents:
        raise UserError(
            f"the training split has {prepared.train_documents} documents, too few for {process_count} processes; "
            "use fewer processes or a corpus of more files"
        )
    if seq_len > prepared.train_pairs:
        raise UserError(
            f"data.seq_len is {seq_len}, but the whole training split has only {prepared.train_pairs} tokens to predict; "
            "lower it or use more text"
        )
    documents = _documents(prepared.train_records, prepared).seed(seed).shuffle()[process_index::process_count]
    if repeat:
        documents = documents.repeat()
    read = documents.to_iter_dataset(grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=READ_AHEAD * read_threads))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read flags, which are parsed only in programs built on absl
            flags.FLAGS.mark_as_parsed()
        read = read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=READ_AHEAD))
    pad = partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return iter(_packed(read, seq_len).batch(batch_size, batch_fn=pad).map(from_packed))


def heldout_batches(prepared: Prepared, *, seq_len: int, sequences: int, batch_size: int) -> list[Batch]:
    """The same held-out rows for every run: `sequences` full rows, evenly spread over the packed held-out text.

    Args:
      prepared: the tokenised corpus.
      seq_len: tokens of a row.
      sequences: rows in total.
      batch_size: rows of a batch; it divides `sequences`.

    Raises:
      UserError: the held-out text does not fill so many rows, or `batch_size` does not divide `sequences`.
    """
    if sequences % batch_size:
        raise UserError(f"{sequences} held-out sequences cannot be cut into batches of {batch_size}; choose a multiple")
    available = prepared.heldout_pairs // seq_len
    if sequences > available:
        raise UserError(
            f"the held-out text has {available} sequences of {seq_len} tokens, but train.eval_sequences is {sequences}; "
            "lower it or data.seq_len, or raise data.heldout_share or use more text"
        )
    wanted = set((np.arange(sequences) * available // sequences).tolist())
    documents = _documents(prepared.heldout_records, prepared).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    rows = [row for index, row in enumerate(_packed(documents, seq_len)) if index in wanted]
    return [
        from_packed({name: np.stack([row[name] for row in rows[start : start + batch_size]]) for name in rows[0]})
        for start in range(0, sequences, batch_size)
    ]


def _documents(records: Path, prepared: Prepared) -> grain.MapDataset[Any]:
    source = grain.sources.ArrayRecordDataSource(str(records))
    return grain.MapDataset.source(source).map(partial(token_pairs, dtype=prepared.token_dtype))


def _packed(documents: grain.IterDataset[Any], seq_len: int) -> grain.IterDataset[Any]:
    """Rows of `seq_len` pairs; a document that does not fit goes on in the next row."""
    lengths = {"tokens": seq_len, "targets": seq_len}
    return _PlainState(grain.experimental.ConcatThenSplitIterDataset(documents, length_struct=lengths))


class _PlainState(grain.IterDataset[Any]):
    """Its parent, a ConcatThenSplitIterDataset, with a state that survives JSON.

    The parent keeps tuples in its state and compares them with tuples, but JSON gives back lists.
    """

    def __iter__(self) -> grain.DatasetIterator[Any]:
        return _PlainStateIterator(iter(self._parent))


class _PlainStateIterator(grain.DatasetIterator[Any]):
    def __next__(self) -> Any:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        state = self._parent.get_state()
        return {**state, "remainder_slices": {name: list(bounds) for name, bounds in state["remainder_slices"].items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state({**state, "remainder_slices": {name: tuple(bounds) for name, bounds in state["remainder_slices"].items()}})
