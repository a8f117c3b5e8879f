"""Does sparse attention find needles that dense attention finds? The study `mhc-jax study needle`, trained from scratch on made sequences.

A small decoder learns the task of needle_task with dense attention, with sparse attention from scratch, and by the published recipe: dense,
indexer alone, sparse. Beside them what must fail: an indexer that is never trained. Each piece of training is kept when it ends.
"""

import io
import json
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from mhc_jax.errors import UserError
from mhc_jax.experiments.needle_report import needle_blocks
from mhc_jax.experiments.needle_task import Task, make_sequences
from mhc_jax.experiments.study import Say, write_study
from mhc_jax.files import AnyPath, write_atomically, write_json
from mhc_jax.nn.decoder import Decoder, logits
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.parallel.rules import Rules
from mhc_jax.sparse_config import SparseConfig
from mhc_jax.train.stages import of_indexer
from mhc_jax.train.step import TrainState, compile_train_step, placed_initial_state

NAME = "needle"
TITLE = "Needles in a haystack: sparse against dense attention"
DEPTHS = 8  # equal parts of the haystack that accuracy is told for
TEST_SEED, TEST_BATCHES = 1_000_003, 16


class Piece(NamedTuple):
    """One piece of training: what it begins with, and how attention works in it."""

    name: str
    begins: str | None  # the piece whose parameters it begins with; None: from scratch
    stage: str  # "dense", "warmup" or "sparse"
    steps: int
    rate: float  # peak learning rate
    frozen: bool = False  # the indexer stays as it was drawn


class Scale(NamedTuple):
    """Sizes of a study: the task and how long to train."""

    task: Task = Task()
    top_k: int = 64
    batch: int = 8
    first: int = 600  # steps from scratch
    warmup: int = 400
    more: int = 150  # steps after that


FULL = Scale()


def pieces(scale: Scale) -> tuple[Piece, ...]:
    """What is trained, in order; all that begins with the same piece has the same number of further steps."""
    return (
        Piece("dense", None, "dense", scale.first, 4e-3),
        Piece("dense, trained on", "dense", "dense", scale.more, 1e-3),
        Piece("sparse from scratch", None, "sparse", scale.first, 4e-3),
        Piece("warm-up of the indexer", "dense", "warmup", scale.warmup, 4e-3),
        Piece("dense, warm-up, sparse", "warm-up of the indexer", "sparse", scale.more, 1e-3),
        Piece("sparse, indexer never trained", "dense", "sparse", scale.more, 1e-3, frozen=True),
    )


def config_of(piece: Piece, scale: Scale) -> Config:
    """Two layers, 64 wide, dense feed-forwards: a question must meet its needle in one hop."""
    sparse = None
    if piece.stage != "dense":
        sparse = SparseConfig(stage=piece.stage, index_heads=4, index_dim=32, top_k=scale.top_k, query_chunk=128)  # type: ignore[arg-type]
    attention = AttentionConfig(4, nope_dim=32, rope_dim=16, value_dim=32, kv_rank=64, q_rank=64, query_block=128, sparse=sparse)
    return Config(
        name=NAME,
        model=ModelConfig(
            residual="residual",
            vocab_size=scale.task.vocab_size,
            num_layers=2,
            dim=64,
            dense_layers=2,
            dense_dim=128,
            attention=attention,
            moe=MoEConfig(num_experts=2, top_k=1, shared_experts=0, expert_dim=16),  # no layer has experts
            init_std=0.1,
            dtype="float32",
            remat="none",
            loss_chunk=scale.task.length,
        ),
        optimizer=OptimizerConfig(learning_rate=piece.rate, warmup_steps=20),
        data=DataConfig(seq_len=scale.task.length),
        train=TrainConfig(
            steps=piece.steps, batch_size=scale.batch, eval_every=piece.steps, eval_sequences=scale.batch, checkpoint_every=piece.steps
        ),
    )


def run(folder: AnyPath, command: str, say: Say, scale: Scale = FULL) -> None:
    """Trains what the folder lacks and rewrites the report after every piece.

    Raises:
      UserError: the folder holds the results of other sizes.
    """
    found = _known(folder, scale)
    for piece in pieces(scale):
        if piece.name not in found["pieces"]:
            say(f"{piece.name}: {piece.steps} steps")
            found["pieces"][piece.name] = result = train(piece, scale, folder)
            write_json(folder / "needle.json", found)
            say(f"{piece.name}: accuracy {result['accuracy']:.3f}, {result['seconds']:.0f} CPU seconds")
        write_study(folder, TITLE, needle_blocks(found, command), say if piece is pieces(scale)[-1] else lambda line: None)


def train(piece: Piece, scale: Scale, folder: AnyPath) -> dict[str, Any]:
    """Trains a piece, writes its parameters to the folder, and tells how it ends."""
    started = time.process_time()
    config, rules, losses = config_of(piece, scale), Rules(), []
    rng, mesh = np.random.default_rng(piece.steps), make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state = placed_initial_state(config, mesh, rules)
        if piece.begins is not None:
            state = state._replace(model=_loaded(folder / _file(piece.begins), state.model))
        drawn = jax.tree.map(jnp.copy, state.model)
        step = compile_train_step(config, rules, state, make_sequences(scale.task, scale.batch, rng).batch)[0]
        for _ in range(piece.steps):
            state, metrics = step(state, make_sequences(scale.task, scale.batch, rng).batch)
            if piece.frozen:
                state = state._replace(model=_with_indexer(state.model, drawn))
            losses.append((metrics.loss, metrics.indexer_loss))
        write_atomically(folder / _file(piece.name), _saved(state.model))
        told: dict[str, Any] = {"stage": piece.stage, "begins": piece.begins, "steps": piece.steps, "rate": piece.rate}
        told |= {"loss": [float(loss) for loss, _ in losses]}
        told |= {"indexer_loss": [None if own is None else float(own) for _, own in losses]}
        if piece.stage == "warmup":  # what it was for: attention to what the indexer chooses, nothing else having changed
            config = config_of(piece._replace(stage="sparse"), scale)
        return told | test(state.model, state, config, scale) | {"seconds": time.process_time() - started}


def test(model: Decoder, state: TrainState, config: Config, scale: Scale) -> dict[str, Any]:
    """Accuracy over new sequences, always the same: of all answers, and by the depth of the needle."""
    model = _of_config(model, config)
    predict = jax.jit(lambda batch: jnp.argmax(_logits(model, batch, state.router_bias), axis=-1))
    rng, right, depth = np.random.default_rng(TEST_SEED), [], []
    for _ in range(TEST_BATCHES):
        made = make_sequences(scale.task, scale.batch, rng)
        right.append(np.asarray(predict(made.batch))[:, made.question] == made.answers)
        depth.append(made.needle * DEPTHS // scale.task.haystack)
    hits, parts = np.concatenate(right), np.concatenate(depth)
    by_depth = [float(hits[parts == part].mean()) for part in range(DEPTHS)]
    return {"accuracy": float(hits.mean()), "answers": hits.size, "by_depth": by_depth}


def _logits(model: Decoder, batch: dict[str, Any], router_bias: jax.Array) -> jax.Array:
    return logits(model, batch["tokens"], batch["positions"], batch["segment_ids"], router_bias)


def _of_config(model: Decoder, config: Config) -> Decoder:
    """The same parameters in a model of another stage."""
    shape = jax.eval_shape(lambda: Decoder(config.model, jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(shape), jax.tree.leaves(model))


@partial(jax.jit, donate_argnums=0)
def _with_indexer(model: Decoder, drawn: Decoder) -> Decoder:
    return jax.tree.map(lambda own, new, old: old if own else new, of_indexer(model), model, drawn)


def _file(name: str) -> str:
    return f"{name.replace(',', '').replace(' ', '_')}.npz"


def _saved(model: Decoder) -> bytes:
    buffer = io.BytesIO()
    leaves = jax.tree_util.tree_leaves_with_path(model)
    np.savez(buffer, **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})  # type: ignore[arg-type]
    return buffer.getvalue()


def _loaded(path: AnyPath, model: Decoder) -> Decoder:
    """The model with the parameters of the file; what the file lacks, such as an indexer, stays."""
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        known = {name: jnp.asarray(arrays[name]) for name in arrays.files}
    return jax.tree_util.tree_map_with_path(lambda place, leaf: known.get(jax.tree_util.keystr(place), leaf), model)


def _known(folder: AnyPath, scale: Scale) -> dict[str, Any]:
    """What needle.json holds, or a beginning."""
    about = scale._asdict() | {"task": vars(scale.task)}
    path = folder / "needle.json"
    if not path.exists():
        return {"about": about, "pieces": {}}
    found = json.loads(path.read_text())
    if found.get("about") != about:
        raise UserError(f"{path} holds results of other sizes; give another --out, or remove it")
    return found
