"""What the indexers of a trained run choose from, and what its attention looks at: held-out text, layer by layer."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from mhc_jax.config import Config, override
from mhc_jax.data.batch import Batch
from mhc_jax.data.pipeline import heldout_batches
from mhc_jax.data.prepare import prepare
from mhc_jax.errors import UserError
from mhc_jax.experiments.selection_recall import Recall, Scored, mean_of, recalls
from mhc_jax.files import AnyPath
from mhc_jax.nn.decode import Network, network_of
from mhc_jax.nn.decoder import embedded, feed_forward, sublayer
from mhc_jax.nn.mla import MLA
from mhc_jax.nn.norm import rms_norm
from mhc_jax.nn.residual.streams import unwritten
from mhc_jax.train.folder import saved_config
from mhc_jax.train.parameters import parameters_of
from mhc_jax.train.step import initial_state
from pallas_kernels.visible import causal_span, is_visible

SEQUENCES = 8
Array = jax.Array


def recalls_of_run(folder: AnyPath) -> Iterator[tuple[str, int, int, Recall]]:
    """Rows of `selection_recall.table`: every layer of the run at its own number of keys, then all layers at a half and a quarter of it.

    Raises:
      UserError: there is no run, its attention is dense throughout, or it reads tables, which are not followed here.
    """
    config, network = network_of_run(folder)
    sparse = config.model.attention.sparse
    assert sparse is not None
    data = prepare(config.data, config.model.vocab_size)
    batches = heldout_batches(data, seq_len=config.data.seq_len, sequences=SEQUENCES, batch_size=1)
    scored = list(zip(*(layers_of(network, batch) for batch in batches)))
    keys, chosen = config.data.seq_len, min(sparse.top_k, config.data.seq_len // 2)
    for layer, of_layer in enumerate(scored):
        yield from ((f"layer {layer}", keys, chosen, found) for found in mean_of([recalls(one, chosen) for one in of_layer]))
    for fewer in (chosen // 2, chosen // 4):
        means = mean_of([recalls(one, fewer) for of_layer in scored for one in of_layer])
        yield from (("all layers", keys, fewer, found) for found in means)


def layers_of(network: Network, batch: Batch) -> list[Scored]:
    """Of one sequence [1, S], what every layer's indexer scores and the mean of its heads' dense probabilities."""
    model, config = network.model, network.model.config
    tokens, positions, segments = (jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids"))
    pending, found = unwritten(embedded(model, tokens), network.layers[0].attention_connection.mapping), []

    @jax.jit
    def step(pending, layer, bias):
        def attend(u, attention, norm):
            u = rms_norm(u, norm, config.norm_eps)
            return attention(u, positions, segments)[0], looked_at(attention, u, positions, segments)

        pending, scored = sublayer(pending, layer.attention_connection, attend, (layer.attention, layer.attention_norm))
        feed = partial(feed_forward, config=config)
        pending, _ = sublayer(pending, layer.ffn_connection, feed, (layer.ffn, layer.ffn_norm, bias))
        return pending, scored

    for layer, bias in zip(network.layers, network.router_bias):
        pending, scored = step(pending, layer, bias)
        found.append(scored)
    return found


def looked_at(attention: MLA, x: Array, positions: Array, segments: Array) -> Scored:
    """The indexer's inputs for attention to x [1, S, C], and its dense probabilities."""
    assert attention.indexer is not None
    span = causal_span(segments)
    q_nope, q_rope, q_latent = attention._queries(x, positions)
    k_nope, k_rope, _ = attention._expanded(attention._latents(x, positions))
    dots = jnp.einsum("bshd,bthd->bhst", q_nope, k_nope) + jnp.einsum("bshr,btr->bhst", q_rope, k_rope)
    seen = is_visible(span, x.shape[1])[:, None]
    probabilities = jax.nn.softmax(jnp.where(seen, dots.astype(jnp.float32) * attention.scale, -jnp.inf), axis=-1).mean(axis=1)
    assert q_latent is not None
    q, weight = attention.indexer.queries(x, q_latent, positions)
    return Scored(q, attention.indexer.keys(x, positions), weight, span, probabilities)


def network_of_run(folder: AnyPath) -> tuple[Config, Network]:
    """The run's config, on one device, and the network of its last checkpoint.

    Raises:
      UserError: as `recalls_of_run`.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"there is no run in {folder}; give the folder of one with sparse attention, such as runs/dsa_laptop-mhc-seed0")
    config = override(saved_config(folder), {"mesh.data": 1, "mesh.fsdp": 1, "train.init_from": None})
    if config.model.attention.sparse is None or config.model.engram is not None:
        raise UserError(f"recall is measured of runs with sparse attention and without Engram; {folder} is that of {config.name}")
    where = SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), jax.eval_shape(lambda: initial_state(config)))
    state, step, missing = parameters_of(folder, config, like)
    if missing:
        raise UserError(f"the checkpoint of step {step} in {folder} lacks {', '.join(missing[:3])}; it is that of another config")
    return config, network_of(state.model, state.router_bias)
