"""Batches of packed documents for training and evaluation, with Grain. What a batch is: batch.

Documents are shuffled, read ahead by threads and worker processes, then concatenated and cut into rows. Packing comes last and in this
process, so that neither threads nor workers change what the batches are. Of a run with many processes each makes the same batches, so that
their number changes nothing either, and keeps the rows that its devices hold (`parallel.rows`). Without weights the documents of all
sources go through one shuffle. With weights every source is shuffled and packed by itself, and their rows are mixed, so that the weights
are shares of tokens however long the documents are.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from mhc_jax.data.batch import Batch, from_packed, token_pairs
from mhc_jax.data.iterators import CachedRecords, Mixed, PlainState, Positioned
from mhc_jax.data.ngrams.hashing import NgramHash
from mhc_jax.data.prepared import Prepared, PreparedSource
from mhc_jax.errors import UserError

READ_AHEAD = 16  # documents for each thread
SEED_STEP = 0x9E3779B9  # between the seeds of the sources of a mixture


def training_batches(
    prepared: Prepared,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    read_threads: int = 4,
    workers: int = 0,
    repeat: bool = True,
    keep: Int[np.ndarray, " kept"] | None = None,
    ngrams: NgramHash | None = None,
) -> grain.DatasetIterator[Batch]:
    """Batches of training text: every epoch all documents in a new order that depends on the seed.

    With weights every source has epochs of its own. The state that `get_state` returns is plain data that survives JSON; after `set_state`
    the iterator goes on bit for bit. A state of an iterator that was made with other text or other arguments (but for read_threads,
    workers and keep) is refused with a UserError.

    Args:
      prepared: the tokenised sources.
      seq_len: tokens of a row.
      batch_size: rows of a batch.
      seed: of the order of documents, below 2**32.
      read_threads: threads that read ahead, in each worker.
      workers: processes that read ahead, for each source that has a weight; 0 reads in this one.
      repeat: whether to go on after one epoch (of every source). If not, the last batch is filled up with padding.
      keep: numbers of the rows of every batch that are wanted here, rising; None: all.
      ngrams: adds the rows of Engram's tables to what is kept of a batch, see batch; they depend on the row of the batch alone.

    Raises:
      UserError: there is less text than one row; while iterating: the cache is damaged.
    """
    groups = [[source] for source in prepared.sources] if prepared.weights else [list(prepared.sources)]
    read_options = grain.ReadOptions(num_threads=max(1, read_threads // len(groups)), prefetch_buffer_size=READ_AHEAD * read_threads)
    parts = []
    for index, sources in enumerate(groups):
        documents = _training(sources).seed((seed + index * SEED_STEP) % 2**32).shuffle()
        if repeat:
            documents = documents.repeat()
        read = documents.to_iter_dataset(read_options)
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain's workers read flags, which are parsed only in programs built on absl
                flags.FLAGS.mark_as_parsed()
            read = read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=READ_AHEAD))
        parts.append(_packed(read, seq_len))
    if seq_len > prepared.train_pairs:
        raise UserError(
            f"data.seq_len is {seq_len}, but the whole training split has only {prepared.train_pairs} tokens to predict; "
            "lower it or use more text"
        )
    rows = Mixed(parts, prepared.shares) if prepared.weights else parts[0]
    fits = {
        "text": prepared.fingerprint,
        "tokenizer": prepared.tokenizer_fingerprint,
        "seed": seed,
        "sequence length": seq_len,
        "sequences": batch_size,
    }
    pad = partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    batches = rows.batch(batch_size, batch_fn=pad).map(from_packed)
    if keep is not None:
        batches = batches.map(partial(_kept, keep=keep))
    if ngrams is not None:
        batches = batches.map(ngrams.add_rows)
        fits["n-gram tables"] = ngrams.artifact.checksum
    return iter(Positioned(batches, fits))


def heldout_batches(
    prepared: Prepared,
    *,
    seq_len: int,
    sequences: int,
    batch_size: int,
    keep: Int[np.ndarray, " kept"] | None = None,
    ngrams: NgramHash | None = None,
) -> list[Batch]:
    """The same held-out rows for every run: `sequences` full rows, evenly spread over the packed held-out text.

    With weights, each source gives its share of the rows (rounded), one source after the other.

    Args:
      prepared: the tokenised sources.
      seq_len: tokens of a row.
      sequences: rows in total.
      batch_size: rows of a batch; it divides `sequences`.
      keep: numbers of the rows of every batch that are wanted here, rising; None: all.
      ngrams: adds the rows of Engram's tables to what is kept of a batch.

    Raises:
      UserError: the held-out text does not fill so many rows, or `batch_size` does not divide `sequences`.
    """
    if sequences % batch_size:
        raise UserError(f"{sequences} held-out sequences cannot be cut into batches of {batch_size}; choose a multiple")
    if prepared.weights:
        counts = apportion(prepared.shares, sequences)
        rows = [row for source, count in zip(prepared.sources, counts) for row in _heldout_rows([source], seq_len, count)]
    else:
        rows = _heldout_rows(prepared.sources, seq_len, sequences)
    batches = [
        from_packed({name: np.stack([row[name] for row in rows[start : start + batch_size]]) for name in rows[0]})
        for start in range(0, sequences, batch_size)
    ]
    if keep is not None:
        batches = [_kept(batch, keep) for batch in batches]
    return batches if ngrams is None else [ngrams.add_rows(batch) for batch in batches]


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, each its share of it rounded down or up; the largest remainders are rounded up."""
    exact = np.asarray(shares) * total
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[index] += 1
    return counts.tolist()


def _kept(batch: Batch, keep: Int[np.ndarray, " kept"]) -> Batch:
    return {name: x[keep] for name, x in batch.items()}


def _heldout_rows(sources: Sequence[PreparedSource], seq_len: int, count: int) -> list[Any]:
    available = sum(source.heldout_pairs for source in sources) // seq_len
    if count > available:
        raise UserError(
            f"the held-out text of {', '.join(source.source for source in sources)} has {available} sequences of {seq_len} tokens, but "
            f"train.eval_sequences asks for {count} of them; lower it or data.seq_len, or raise data.heldout_share or use more text"
        )
    wanted = set((np.arange(count) * available // max(count, 1)).tolist())
    records = [CachedRecords(source.heldout_records, source, source.heldout_documents) for source in sources]
    documents = _documents(records, sources).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return [row for index, row in enumerate(_packed(documents, seq_len)) if index in wanted]


def _training(sources: Sequence[PreparedSource]) -> grain.MapDataset[Any]:
    return _documents([CachedRecords(source.train_records, source, source.train_documents) for source in sources], sources)


def _documents(records: Sequence[CachedRecords], sources: Sequence[PreparedSource]) -> grain.MapDataset[Any]:
    """The token pairs of each document, those of all sources one after the other."""
    parts = [
        grain.MapDataset.source(of_source).map(partial(token_pairs, dtype=source.token_dtype))
        for of_source, source in zip(records, sources)
    ]
    return parts[0] if len(parts) == 1 else grain.MapDataset.concatenate(parts)


def _packed(documents: grain.IterDataset[Any], seq_len: int) -> grain.IterDataset[Any]:
    """Rows of `seq_len` pairs; a document that does not fit goes on in the next row."""
    lengths = {"tokens": seq_len, "targets": seq_len}
    return PlainState(grain.experimental.ConcatThenSplitIterDataset(documents, length_struct=lengths))
