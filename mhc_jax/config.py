"""What a run is: frozen dataclasses nested by concern, and the one function that validates them.

A config is plain data. It holds no arrays and imports no JAX, so that it can be printed, compared, sent and hashed. Named configs are
functions in `configs/`; every field can be set from the command line by its path (`--model.moe.top-k 2`).
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mhc_jax.engram_config import EngramConfig, check_engram
from mhc_jax.errors import UserError
from mhc_jax.mesh_config import MeshConfig, check_mesh, divides
from mhc_jax.residual_kinds import KINDS, MOST_COLUMNS
from mhc_jax.sparse_config import SparseConfig, check_sparse
from mhc_jax.typecheck import check_types, group_of, shown


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, with YaRN (arXiv 2309.00071) when `yarn_factor` is above 1."""

    theta: float = 10_000.0  # base of the geometric series of wavelengths
    yarn_factor: float = 1.0  # context extension; 1 is plain rotary embedding
    original_length: int = 4096  # tokens; the context that the model was trained on before the extension
    beta_fast: float = 32.0  # rotations within original_length above which a frequency is kept
    beta_slow: float = 1.0  # rotations within original_length below which a frequency is interpolated
    mscale: float = 1.0  # strength of YaRN's softmax temperature


@dataclass(frozen=True)
class AttentionConfig:
    """Multi-head latent attention (MLA; arXiv 2405.04434, section 2.1)."""

    num_heads: int
    nope_dim: int = 128  # per head: query and key dimensions that carry no position
    rope_dim: int = 64  # per head: rotated query dimensions; the rotated key is shared by all heads
    value_dim: int = 128  # per head
    kv_rank: int = 512  # width of the latent that keys and values are expanded from
    q_rank: int | None = None  # width of the query latent; None computes queries directly from the input
    qk_norm: bool = False  # RMS-normalise queries and keys before the rotation
    query_block: int = 512  # tokens; attention scores exist for this many queries at a time
    rope: RopeConfig = RopeConfig()
    sparse: SparseConfig | None = None  # DeepSeek Sparse Attention, see docs/sparse_attention.md; None: every query sees every earlier key


@dataclass(frozen=True)
class MoEConfig:
    """DeepSeekMoE (arXiv 2401.06066) with loss-free balancing (arXiv 2408.15664)."""

    num_experts: int  # routed experts
    top_k: int  # routed experts that a token visits
    shared_experts: int  # experts that every token visits, held as one of that many times the width
    expert_dim: int  # hidden width of one expert
    num_groups: int = 1  # expert groups; the routing is limited to the best `top_groups` of them
    top_groups: int = 1
    routed_scaling: float = 1.0  # factor on the routed experts' renormalised weights
    bias_rate: float = 1e-3  # step of the selection bias towards balance, per optimizer step
    balance_loss: float = 1e-4  # weight (alpha) of the sequence-wise balance loss; perfect balance gives exactly alpha


@dataclass(frozen=True)
class ConnectionConfig:
    """What the residual kinds with several streams share (arXiv 2512.24880)."""

    streams: int = 4  # n, parallel residual streams
    sinkhorn_steps: int = 20  # t_max, pairs of column and row normalisation
    gate_init: float = 0.01  # initial gates (alpha) of the token-dependent part
    res_diagonal: float = 4.0  # mHC's initial H_res logits: this on the diagonal, 0 elsewhere (4 gives 0.948 on H_res's diagonal)
    collapse: Literal["mean", "sum", "learned"] = "mean"  # streams to one vector before the final norm


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: embedding, layers of attention and feed-forward joined by residual connections, and the output head."""

    residual: str  # how sublayers are joined; the part that an ablation changes: a name of mhc_jax/residual_kinds.py, or a registered one
    vocab_size: int
    num_layers: int  # a layer is two sublayers: attention and feed-forward
    dim: int  # C, width of one residual stream
    dense_layers: int  # leading layers whose feed-forward is one dense SwiGLU instead of experts
    dense_dim: int  # hidden width of that dense SwiGLU
    attention: AttentionConfig
    moe: MoEConfig
    connections: ConnectionConfig = ConnectionConfig()
    engram: EngramConfig | None = None  # memory looked up by hashed n-grams, see docs/engram.md; None: without
    norm_eps: float = 1e-20  # of every RMSNorm
    init_std: float = 0.006  # of weight matrices and embeddings
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of streams and matrix products; coefficients, router and norms are float32
    # What the backward pass recomputes of a layer, see nn/remat.py.
    remat: Literal["none", "streams", "matmuls", "attention", "full"] = "full"
    loss_chunk: int = 512  # tokens of each sequence whose logits exist at a time


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and two steps down (arXiv 2512.24880, Table 5)."""

    learning_rate: float
    kind: Literal["adamw", "muon"] = "adamw"  # muon trains matrices, and AdamW embedding, output head and vectors
    warmup_steps: int = 2000
    decay_points: tuple[float, float] = (0.8, 0.9)  # share of the run's steps at which the learning rate drops
    decay_factors: tuple[float, float] = (0.316, 0.1)  # learning rate after each drop, relative to the peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-20
    weight_decay: float = 0.1  # on matrices; never on norms, biases and gates
    clip_norm: float = 1.0  # global gradient norm
    moments: Literal["float32", "bfloat16"] = "float32"  # of the network, between steps; DeepSeek-V3 kept them in bfloat16


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is cut into sequences."""

    seq_len: int  # tokens
    # Sources of documents: "stdlib", the running interpreter's own library source; a glob of files; or "hf:NAME", a Hugging Face data set.
    # See docs/data.md.
    source: tuple[str, ...] = ("stdlib",)
    weights: tuple[float, ...] = ()  # share of the training tokens from each source; none: in proportion to their sizes
    text_field: str = "text"  # field of a JSON line, Parquet row or data set row that holds the document
    max_bad_records: int = 100  # unreadable records of a source that are skipped and counted before preparation fails
    tokenizer: str | None = None  # path of a tokenizer.json; None trains a byte-level BPE of model.vocab_size on the training split
    heldout_share: float = 0.05  # share of the documents kept out of training
    read_threads: int = 4  # threads that read ahead
    workers: int = 0  # processes that read ahead; 0 reads in this one


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to write on the way."""

    steps: int
    batch_size: int  # sequences per optimizer step, over all devices
    microbatches: int = 1  # parts that a batch is cut into; gradients are summed over them
    seed: int = 0  # of parameters and of the order of the data
    init_from: str | None = None  # folder of a run whose last checkpoint's parameters this one begins with; what it lacks begins anew
    eval_every: int = 500  # steps between evaluations on held-out text
    eval_sequences: int = 64  # held-out sequences in an evaluation
    checkpoint_every: int = 1000  # steps
    keep_last: int = 2  # newest checkpoints to keep
    keep_best: int = 1  # checkpoints of lowest held-out loss to keep
    max_nonfinite_steps: int = 10  # steps in a row whose loss or gradient is not finite, each skipped, before the run stops
    rollback_deviations: float = 0.0  # a loss so many standard deviations above the 50 steps before goes back to a checkpoint; 0: never
    max_rollbacks: int = 3  # roll-backs before the run stops


@dataclass(frozen=True)
class Config:
    """One training run. Constructing it validates every field."""

    name: str
    model: ModelConfig
    optimizer: OptimizerConfig
    data: DataConfig
    train: TrainConfig
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        validate(self)

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.data.seq_len


def validate(config: Config) -> None:
    """Checks every field and every pair of fields that must fit.

    Raises:
      UserError: the first thing wrong, named by its field path with the offending numbers and what would do.
    """
    check_types(config)
    m, a, e, c, o, d, t, mesh = (
        config.model,
        config.model.attention,
        config.model.moe,
        config.model.connections,
        config.optimizer,
        config.data,
        config.train,
        config.mesh,
    )

    if m.residual not in KINDS:
        raise UserError(f"model.residual is {shown(m.residual)}; it must be one of {', '.join(KINDS)}")
    if not config.name or len(config.name) > 100 or config.name in (".", "..") or any(mark in config.name for mark in "/\\\n\r"):
        raise UserError(f"name is {shown(config.name)}; it names folders, so it must be 1 to 100 characters without slashes and line ends")

    positive = {
        "model.vocab_size": m.vocab_size,
        "model.num_layers": m.num_layers,
        "model.dim": m.dim,
        "model.loss_chunk": m.loss_chunk,
        "model.norm_eps": m.norm_eps,
        "model.init_std": m.init_std,
        "model.attention.num_heads": a.num_heads,
        "model.attention.nope_dim": a.nope_dim,
        "model.attention.rope_dim": a.rope_dim,
        "model.attention.value_dim": a.value_dim,
        "model.attention.kv_rank": a.kv_rank,
        "model.attention.query_block": a.query_block,
        "model.attention.rope.original_length": a.rope.original_length,
        "model.attention.rope.beta_slow": a.rope.beta_slow,
        "model.moe.num_experts": e.num_experts,
        "model.moe.top_k": e.top_k,
        "model.moe.expert_dim": e.expert_dim,
        "model.moe.num_groups": e.num_groups,
        "model.moe.top_groups": e.top_groups,
        "model.moe.routed_scaling": e.routed_scaling,
        "model.connections.streams": c.streams,
        "model.connections.sinkhorn_steps": c.sinkhorn_steps,
        "optimizer.learning_rate": o.learning_rate,
        "optimizer.eps": o.eps,
        "optimizer.clip_norm": o.clip_norm,
        "data.seq_len": d.seq_len,
        "data.read_threads": d.read_threads,
        "train.steps": t.steps,
        "train.batch_size": t.batch_size,
        "train.microbatches": t.microbatches,
        "train.eval_every": t.eval_every,
        "train.eval_sequences": t.eval_sequences,
        "train.checkpoint_every": t.checkpoint_every,
        "train.keep_last": t.keep_last,
        "train.max_nonfinite_steps": t.max_nonfinite_steps,
        "mesh.data": mesh.data,
        "mesh.fsdp": mesh.fsdp,
        "mesh.expert": mesh.expert,
        "mesh.context": mesh.context,
        "mesh.tensor": mesh.tensor,
    }
    if a.q_rank is not None:
        positive["model.attention.q_rank"] = a.q_rank
    if m.dense_layers:
        positive["model.dense_dim"] = m.dense_dim
    for path, value in positive.items():
        if value <= 0:
            raise UserError(f"{path} is {value}; it must be a positive finite number")

    not_negative = {
        "model.dense_layers": m.dense_layers,
        "model.dense_dim": m.dense_dim,
        "model.attention.rope.mscale": a.rope.mscale,
        "model.moe.shared_experts": e.shared_experts,
        "model.moe.bias_rate": e.bias_rate,
        "model.moe.balance_loss": e.balance_loss,
        "optimizer.warmup_steps": o.warmup_steps,
        "optimizer.weight_decay": o.weight_decay,
        "data.workers": d.workers,
        "train.seed": t.seed,
        "train.keep_best": t.keep_best,
        "train.rollback_deviations": t.rollback_deviations,
        "train.max_rollbacks": t.max_rollbacks,
        "data.max_bad_records": d.max_bad_records,
    }
    for path, value in not_negative.items():
        if value < 0:
            raise UserError(f"{path} is {value}; it must be zero or a positive finite number")

    for path, beta in (("optimizer.beta1", o.beta1), ("optimizer.beta2", o.beta2)):
        if not 0 <= beta < 1:
            raise UserError(f"{path} is {beta}; it must lie in [0, 1)")
    if not 0 < d.heldout_share < 1:
        raise UserError(f"data.heldout_share is {d.heldout_share}; it must lie between 0 and 1, for example 0.05")
    _check_sources(d)
    if not 0 < o.decay_points[0] <= o.decay_points[1] <= 1:
        raise UserError(f"optimizer.decay_points is {o.decay_points}; it needs two rising shares of the run, for example (0.8, 0.9)")
    if not 1 >= o.decay_factors[0] >= o.decay_factors[1] >= 0:
        raise UserError(
            f"optimizer.decay_factors is {o.decay_factors}; it needs two falling shares of the peak learning rate, for example (0.316, 0.1)"
        )

    _at_most("model.dense_layers", m.dense_layers, "model.num_layers", m.num_layers)
    divides("2 (rotary pairs)", 2, "model.attention.rope_dim", a.rope_dim)
    if a.rope.theta <= 1:
        raise UserError(f"model.attention.rope.theta is {a.rope.theta}; it must be above 1, for example 10000")
    _at_most("model.attention.rope.beta_slow", a.rope.beta_slow, "model.attention.rope.beta_fast", a.rope.beta_fast)
    if a.rope.yarn_factor < 1:
        raise UserError(
            f"model.attention.rope.yarn_factor is {a.rope.yarn_factor}; 1 is plain rotary embedding, above 1 extends the context"
        )
    divides("model.moe.num_groups", e.num_groups, "model.moe.num_experts", e.num_experts)
    _at_most("model.moe.top_groups", e.top_groups, "model.moe.num_groups", e.num_groups)
    reachable = e.num_experts // e.num_groups * e.top_groups
    if e.top_k > reachable:
        raise UserError(
            f"model.moe.top_k is {e.top_k}, but {e.top_groups} of {e.num_groups} groups hold only {reachable} of the "
            f"{e.num_experts} experts; lower top_k or raise top_groups"
        )
    if a.sparse is not None:
        check_sparse(a.sparse, rope_dim=a.rope_dim, q_rank=a.q_rank, qk_norm=a.qk_norm, seq_len=d.seq_len)
    if m.engram is not None:
        check_engram(m.engram, m.num_layers, m.vocab_size)
        if a.sparse is not None and a.sparse.stage == "warmup" and m.engram.tables.placement == "host":
            raise UserError(
                'model.attention.sparse.stage "warmup" freezes tables, which those in host memory cannot be; '
                'set model.engram.tables.placement to "device"'
            )
    if t.init_from == "":
        raise UserError("train.init_from is empty; give the folder of a run")
    if c.streams > 8:
        raise UserError(f"model.connections.streams is {c.streams}; 1 to 8 are supported")
    if (columns := KINDS[m.residual].columns(c.streams)) > MOST_COLUMNS:
        raise UserError(
            f"model.connections.streams is {c.streams}, for which {m.residual} predicts {columns} coefficients a token; up to "
            f"{MOST_COLUMNS} are supported; lower it"
        )
    # Each of these is a loop or so many threads: a slip of the hand should be a message, not a machine that stands still.
    for path, value, limit in (
        ("model.connections.sinkhorn_steps", c.sinkhorn_steps, 1000),
        ("data.read_threads", d.read_threads, 1024),
        ("data.workers", d.workers, 1024),
        ("data.seq_len / model.attention.query_block", -(-d.seq_len // a.query_block), 4096),
    ):
        if value > limit:
            raise UserError(f"{path} is {value}; up to {limit} is supported")

    divides("train.microbatches", t.microbatches, "train.batch_size", t.batch_size)
    check_mesh(config)
    # A checkpoint carries the held-out loss that decides whether it is kept as one of the best.
    divides("train.eval_every", t.eval_every, "train.checkpoint_every", t.checkpoint_every)


def _check_sources(data: DataConfig) -> None:
    if not all(data.source) or not data.source:
        raise UserError('data.source is empty; give a glob of files, "stdlib" or "hf:NAME"')
    if len(set(data.source)) < len(data.source):
        raise UserError(f"data.source names a source twice ({', '.join(data.source)}); data.weights can make one count more")
    if data.weights and len(data.weights) != len(data.source):
        raise UserError(
            f"data.weights has {len(data.weights)} weights, but data.source has {len(data.source)} sources; give one for each, or none"
        )
    for weight in data.weights:
        if weight <= 0:
            raise UserError(f"data.weights holds {weight}; every weight must be a positive finite number")
    if not data.text_field:
        raise UserError("data.text_field is empty; name the field or column that holds the text")
    if data.tokenizer == "":
        raise UserError("data.tokenizer is empty; give the path of a tokenizer.json, or None to train a tokenizer")


def _at_most(path: str, value: float, limit_path: str, limit: float) -> None:
    if value > limit:
        raise UserError(f"{path} is {value}, more than {limit_path} = {limit}; lower it")


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("model.moe.top_k", 2) for every leaf field of a (nested) config dataclass, in the order of declaration."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns the config with the fields at the given paths changed: `override(c, {"model.moe.top_k": 2})`."""
    if not dataclasses.is_dataclass(config):
        raise UserError(f"{', '.join(changes)}: there are no fields below {shown(config)}; a group that is None must be given as a whole")
    nested: dict[str, dict[str, Any]] = {}
    direct: dict[str, Any] = {}
    for path, value in changes.items():
        head, dot, rest = path.partition(".")
        if head not in {f.name for f in dataclasses.fields(config)} or (dot and not rest):
            raise UserError(
                f"there is no config field {path!r}; the fields here are {', '.join(f.name for f in dataclasses.fields(config))}"
            )
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            direct[head] = value
    for head, inner in nested.items():
        direct[head] = override(direct.get(head, getattr(config, head)), inner)
    return dataclasses.replace(config, **direct)


def to_text(config: Config) -> str:
    """One line `path = value` a field: what a checked-in golden text and a run folder hold."""
    return "".join(f"{path} = {json.dumps(value)}\n" for path, value in fields(config))


def difference(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Field paths in which two configs differ, with both values."""
    ours, theirs = dict(fields(a)), dict(fields(b))
    # A group that one of the two has and the other has not is one field, None, in the other.
    paths = [*ours, *(path for path in theirs if path not in ours)]
    return {path: (ours.get(path), theirs.get(path)) for path in paths if ours.get(path) != theirs.get(path)}


def to_json(config: Config) -> dict[str, Any]:
    """A nested dictionary of plain values; `from_json` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(data: dict[str, Any]) -> Config:
    """The config that `to_json` wrote.

    Raises:
      UserError: a field is missing or unknown, as in a file written by another version.
    """
    return _from_json(Config, data, "")


def _from_json(cls: type, data: Any, prefix: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(data, dict) or set(data) != set(known):
        odd = sorted(set(data) ^ set(known)) if isinstance(data, dict) else [prefix.removesuffix(".") or "the whole"]
        raise UserError(f"a saved config does not have the fields of this version: {', '.join(shown(prefix + name)[1:-1] for name in odd)}")
    values = {}
    for name, f in known.items():
        value = data[name]
        group, optional = group_of(f.type)
        if group is not None and not (optional and value is None):
            value = _from_json(group, value, f"{prefix}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return cls(**values)
