"""The config of Engram (conditional memory by hashed n-grams, arXiv 2601.07372), and what its values may be. A part of config.ModelConfig.

Like all of a config it is plain data. Published sets of values are in configs/engram.py; docs/engram.md says what each field does.
"""

from dataclasses import dataclass
from typing import Literal

from mhc_jax.errors import UserError

LARGEST_ORDER = 8
MOST_HEADS = 64
SMALLEST_TABLE = 3  # the primes must be odd: the hash on the device divides by them in Montgomery's way
CONV_ORDER = 3  # the paper's convolution has the largest order as its dilation, and its kernels are made for that of 3
ROWS_LIMIT = 2**31  # rows of a layer are numbered by int32


# Fields that decide which row a token reads: the identity of trained tables. The others say what is done with rows.
HASH_FIELDS = ("layers", "layer_base", "orders", "heads", "table_sizes", "seed", "pad_id", "compression", "cross_documents")


@dataclass(frozen=True)
class TableConfig:
    """How the tables are trained. Adam, five times the learning rate and no weight decay are the paper's (Table 5)."""

    optimizer: Literal["adam", "row_second_moment", "sinkhorn"] = "adam"  # see docs/engram_tables.md
    learning_rate_factor: float = 5.0  # on the learning rate of the step
    init_std: float = 0.02  # of the first values; not published
    capacity: float = 2.0  # rows that a device sends to another in one round of the exchange, over an even share
    placement: Literal["device", "host"] = "device"  # whose memory holds the tables, see docs/engram_host.md
    hot_rows: int = 0  # with "host": rows of each layer's table that stay on the device


@dataclass(frozen=True)
class EngramConfig:
    """Which n-grams are looked up where, in tables of what size, and how the network reads them."""

    layers: tuple[int, ...]  # layers that have a memory, rising; the first layer of the model has the number `layer_base`
    table_sizes: tuple[int, ...]  # for each order: least rows of a head's table; each head takes the next prime that no other has
    orders: tuple[int, ...] = (2, 3)  # n: lengths of the n-grams in tokens, rising
    heads: int = 8  # K, tables of each order
    layer_base: int = 0  # the paper counts layers from 1, code from 0; multipliers depend on the number counted from 0
    seed: int = 0  # of the multipliers
    pad_id: int | None = None  # token id (not compressed) that stands before the beginning; None: end-of-text
    compression: bool = True  # whether tokens whose normalised text is equal count as one
    cross_documents: bool = False  # whether n-grams (and the convolution) reach into the document before, as in the published code
    head_dim: int = 80  # width of a row
    conv: bool = True  # whether a short causal convolution follows the gate: in the paper, but not in V4.1
    tables: TableConfig = TableConfig()

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The layers, counted from 0."""
        return tuple(layer - self.layer_base for layer in self.layers)

    @property
    def all_heads(self) -> int:
        """H, rows that a token reads in a layer."""
        return len(self.orders) * self.heads

    @property
    def width(self) -> int:
        """d_mem, numbers that a token reads in a layer."""
        return self.all_heads * self.head_dim


def check_engram(engram: EngramConfig, num_layers: int, vocab_size: int) -> None:
    """Checks ranges and pairs; the types are checked already.

    Raises:
      UserError: the first thing wrong, named by its field path.
    """
    path = "model.engram"
    for name, values in (("layers", engram.layers), ("orders", engram.orders)):
        if not values or list(values) != sorted(set(values)):
            raise UserError(f"{path}.{name} is {values}; it must hold one or more rising numbers")
    if engram.layer_base not in (0, 1):
        raise UserError(f"{path}.layer_base is {engram.layer_base}; layers are counted from 0 or from 1")
    if engram.layer_ids[0] < 0 or engram.layer_ids[-1] >= num_layers:
        raise UserError(
            f"{path}.layers is {engram.layers}, but the model's layers are {engram.layer_base} to {num_layers - 1 + engram.layer_base} "
            f"({path}.layer_base is {engram.layer_base})"
        )
    if engram.orders[0] < 2 or engram.orders[-1] > LARGEST_ORDER:
        raise UserError(f"{path}.orders is {engram.orders}; 2 to {LARGEST_ORDER} are supported")
    if not 1 <= engram.heads <= MOST_HEADS:
        raise UserError(f"{path}.heads is {engram.heads}; 1 to {MOST_HEADS} are supported")
    if len(engram.table_sizes) != len(engram.orders):
        raise UserError(f"{path}.table_sizes has {len(engram.table_sizes)} sizes, but {path}.orders has {len(engram.orders)} orders")
    if min(engram.table_sizes) < SMALLEST_TABLE:
        raise UserError(f"{path}.table_sizes is {engram.table_sizes}; every size must be at least {SMALLEST_TABLE}")
    if (rows := engram.heads * sum(engram.table_sizes)) >= ROWS_LIMIT:
        raise UserError(f"{path}.table_sizes and {path}.heads ask for {rows} rows a layer; fewer than {ROWS_LIMIT} are supported")
    if engram.head_dim < 1:
        raise UserError(f"{path}.head_dim is {engram.head_dim}; it must be a positive number")
    if engram.conv and engram.orders[-1] != CONV_ORDER:
        raise UserError(
            f"{path}.conv needs {CONV_ORDER} as the largest of {path}.orders, which is its dilation, but that is {engram.orders[-1]}; "
            f"set {path}.conv to false"
        )
    _check_tables(engram.tables, rows)
    if engram.seed < 0:
        raise UserError(f"{path}.seed is {engram.seed}; it must not be negative")
    if engram.pad_id is not None and not 0 <= engram.pad_id < vocab_size:
        raise UserError(f"{path}.pad_id is {engram.pad_id}; it must be a token id, 0 to {vocab_size - 1}")


def _check_tables(tables: TableConfig, rows: int) -> None:
    """`rows`: how many a layer's table has at least."""
    path = "model.engram.tables"
    for name, value in (
        ("learning_rate_factor", tables.learning_rate_factor),
        ("init_std", tables.init_std),
        ("capacity", tables.capacity),
    ):
        if value <= 0:
            raise UserError(f"{path}.{name} is {value}; it must be a positive finite number")
    if tables.placement == "host" and tables.optimizer == "sinkhorn":
        raise UserError(
            f'{path}.placement is "host", but {path}.optimizer is "sinkhorn", which moves every row in every step; "adam" and '
            '"row_second_moment" work there, which move the rows of a batch alone'
        )
    if tables.hot_rows and tables.placement == "device":
        raise UserError(
            f'{path}.hot_rows is {tables.hot_rows}, but {path}.placement is "device", where all rows stay on the device; '
            f'set {path}.hot_rows to 0, or {path}.placement to "host"'
        )
    if not 0 <= tables.hot_rows <= rows:
        raise UserError(f"{path}.hot_rows is {tables.hot_rows}; 0 to {rows} are supported with these table_sizes and heads")
