"""What a finished run with Engram did with its memory: RUN/memory.json. The file is read by memory_records and drawn by
figures_memory.

Two questions that the loss does not answer: how full the tables are, and which tokens open the gates.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int32

from mhc_jax.config import Config, override
from mhc_jax.data.batch import Batch
from mhc_jax.data.ngrams.artifact import EngramArtifact, open_artifact
from mhc_jax.data.ngrams.hashing import NgramHash
from mhc_jax.data.pipeline import heldout_batches, training_batches
from mhc_jax.data.prepare import Prepared, prepare
from mhc_jax.data.tokenizer import load_tokenizer
from mhc_jax.experiments.memory_records import FILE, MemoryStudy, TableUse
from mhc_jax.files import AnyPath, write_json
from mhc_jax.nn.decoder import batch_loss
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.train.checkpoint import Checkpoints
from mhc_jax.train.memory import read
from mhc_jax.train.step import TrainState, placed_initial_state

Train = Callable[[Config, AnyPath], dict[str, Any]]


def studied(train: Train) -> Train:
    """`train`, and after a run with Engram its study."""

    def train_and_study(config: Config, folder: AnyPath) -> dict[str, Any]:
        summary = train(config, folder)
        if config.model.engram is not None and not (folder / FILE).exists():
            studied = asdict(study(config, folder))
            if jax.process_index() == 0:
                write_json(folder / FILE, studied)
        return summary

    return train_and_study


def study(config: Config, folder: AnyPath) -> MemoryStudy:
    """Studies the last checkpoint of a finished run."""
    engram = config.model.engram
    assert engram is not None
    data = prepare(config.data, config.model.vocab_size, progress=lambda line: None)
    artifact = open_artifact(folder, engram, data)
    batch = heldout_batches(data, seq_len=config.data.seq_len, sequences=1, batch_size=1, ngrams=NgramHash(artifact))[0]
    tokenizer = load_tokenizer(data.sources[0].tokenizer, data.vocab_size)
    used = batch["segment_ids"][0] > 0
    tokens = tokenizer.texts(batch["tokens"][0][used].tolist())
    gates = gates_of(config, folder, [batch])[0][:, used]
    return MemoryStudy(
        tables=table_use(training_rows(config, data, artifact), artifact),
        tokens=tuple(tokens),
        gates=tuple(tuple(round(float(x), 4) for x in of_layer) for of_layer in gates),
    )


def training_rows(config: Config, data: Prepared, artifact: EngramArtifact) -> Int32[np.ndarray, "tokens layers heads"]:
    """The rows that the run's training tokens read, without padding."""
    batches = training_batches(
        data,
        seq_len=config.data.seq_len,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        read_threads=config.data.read_threads,
        ngrams=NgramHash(artifact),
    )
    batch_of = (next(batches) for _ in range(config.train.steps))
    return np.concatenate([batch["engram_rows"][batch["segment_ids"] > 0] for batch in batch_of])


def table_use(rows: Int32[np.ndarray, "tokens layers heads"], artifact: EngramArtifact) -> tuple[TableUse, ...]:
    """Counts rows and collisions. N-grams are told apart by the rows of all heads together, which hardly two of them share."""
    engram, found = artifact.config, []
    for position, layer in enumerate(engram.layer_ids):
        for place, order in enumerate(engram.orders):
            heads = slice(place * engram.heads, (place + 1) * engram.heads)
            ngrams = np.unique(rows[:, position, heads], axis=0)
            sizes = artifact.primes[position, place]
            counts = [np.unique(ngrams[:, head], return_counts=True)[1] for head in range(engram.heads)]
            touched = sum(len(count) for count in counts) / int(sizes.sum())
            alone = float(np.mean([(count == 1).sum() for count in counts]))
            found.append(TableUse(layer, order, int(sizes.sum()), round(touched, 4), len(ngrams), round(1 - alone / len(ngrams), 4)))
    return tuple(found)


def gates_of(config: Config, folder: AnyPath, batches: Sequence[Batch]) -> list[np.ndarray]:
    """Mean over streams of the gates of a finished run's last checkpoint, for each batch of one sequence with its `engram_rows`.

    Returns:
      [layers with a memory, seq_len] each, float32, between 0 and 1.
    """
    # A checkpoint is the same wherever the tables lie. Tables that only host memory can hold cannot be studied in this way.
    config = override(config, {"model.engram.tables.placement": "device", "model.engram.tables.hot_rows": 0})
    mesh, rules = make_mesh(config.mesh), Rules()
    shards = config.mesh.devices
    with jax.set_mesh(mesh), Checkpoints(folder, config, lambda line: None) as checkpoints:
        restored = checkpoints.restore(placed_initial_state(config, mesh, rules))
        assert restored is not None, "a finished run has a checkpoint"
        place = partial(jax.device_put, device=NamedSharding(mesh, rules.spec("batch", "sequence")))

        @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))  # whole in every process
        def gates(state: TrainState, batch: dict[str, Any]) -> Any:
            values, _ = read(state.memory, batch["engram_rows"], config, rules)
            aux = batch_loss(state.model, batch, state.router_bias, memory=values, rules=rules, trace=True)[2]
            assert aux.gates is not None
            return aux.gates.mean(axis=1)

        return [
            np.asarray(gates(restored[0], {name: place(np.repeat(x, shards, axis=0)) for name, x in batch.items()})) for batch in batches
        ]
