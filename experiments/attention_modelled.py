"""What attention takes on TPUs that are not there, by the compiler's schedule (`pallas_kernels.static_cost`): modelled times.

One layer at DeepSeek-V3.2's shape, bfloat16, one sequence, what the kernels run for each of the parts. A model executes a kernel's schedule
step by step, so whole sequences of 128K tokens would take hours: programs are short, and `Times` says how longer ones follow from them.
Every figure is kept in a file and asked for once.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.configs.sparse import deepseek_v32
from mhc_jax.files import AnyPath, write_json
from mhc_jax.parallel.devices import has_accelerator
from pallas_kernels.attention import dense_attention
from pallas_kernels.indexer import select_pages, select_tokens
from pallas_kernels.measure import measure_us
from pallas_kernels.sparse_attention import sparse_mla
from pallas_kernels.static_cost import check_libtpu, cost
from pallas_kernels.visible import PAGE, Selected, Span

FILE = "modelled.json"
TOPOLOGIES = ("v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1")
K = 1024
CACHES = (8 * K, 32 * K, 128 * K)  # keys that a chunk of queries chooses tokens from
CHUNK = 512  # queries that choose, and that attend to pages
Say = Callable[[str], None]


@dataclass(frozen=True)
class Program:
    """One program to model."""

    part: str  # "dense", "pages" or "tokens": attention; "select_pages", "select_tokens": indexer scores and choice
    queries: int
    keys: int
    heads: int = 128

    @property
    def key(self) -> str:
        return f"{self.part}/s{self.queries}_t{self.keys}_h{self.heads}"


@dataclass(frozen=True)
class Sizes:
    """The programs that all times follow from."""

    whole: tuple[int, ...]  # sequences of dense attention, and of the choice of pages
    dense_heads: int
    tokens: Program  # attention to chosen tokens

    @property
    def programs(self) -> list[Program]:
        """All of them, the quickest first."""
        return [
            *(Program("select_tokens", CHUNK, keys) for keys in CACHES),
            *(Program("select_pages", tokens, tokens) for tokens in self.whole),
            *(Program("dense", tokens, tokens, self.dense_heads) for tokens in self.whole),
            Program("pages", CHUNK, CACHES[1]),
            self.tokens,
        ]


# A model takes long for what a chip does quickly. Few queries attend to tokens, of few keys: what is done once for all keys must not seem
# theirs. A GPU wants more work than that to be busy.
MODELLED = Sizes((4 * K, 8 * K, 16 * K), 2, Program("tokens", 32, 4 * K))
MEASURED = Sizes((4 * K, 16 * K, 64 * K, 128 * K), 128, Program("tokens", CHUNK, CACHES[1]))


def model_all(folder: AnyPath, say: Say, topologies: tuple[str, ...] = TOPOLOGIES, wanted: list[Program] | None = None) -> dict[str, Any]:
    """Models what FOLDER/modelled.json lacks, and returns what it then holds: by topology and program, time and temporaries.

    Without libtpu nothing is modelled, and what is there is returned. A program that the compiler refuses is kept with its reason.
    """
    path = folder / FILE
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    todo = [(t, p) for p in (MODELLED.programs if wanted is None else wanted) for t in topologies if p.key not in known.get(t, {})]
    if not todo:
        return known
    try:
        check_libtpu()
    except ValueError as error:
        say(f"nothing is modelled: {error}")
        return known
    for number, (topology, program) in enumerate(todo, start=1):
        say(f"modelling {program.key} on {topology} ({number} of {len(todo)})")
        known.setdefault(topology, {})[program.key] = _modelled(program, topology)
        write_json(path, known)
    return known


def measure_all(folder: AnyPath, say: Say) -> dict[str, Any]:
    """Programs on the accelerator that is here, by its name: times measured. Without one, what FOLDER/measured.json holds."""
    path = folder / "measured.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if not has_accelerator():
        return known
    device = jax.devices()[0].device_kind
    for program in MEASURED.programs:
        if program.key not in known.setdefault(device, {}):
            say(f"measuring {program.key} on {device}")
            fn, args = build(program)
            known[device][program.key] = {"us": measure_us(fn, drawn(program, args)), "problems": []}
            write_json(path, known)
    return known


def _modelled(program: Program, topology: str) -> dict[str, Any]:
    try:
        found = cost(partial(build, program), 1, topology)  # of a floor nothing is asked
    except RuntimeError as error:
        return {"problems": [str(error)]}
    return {
        "us": found.modelled_us,
        "kernel_us": found.kernel_us,
        "temp_bytes": found.hbm_temp_bytes,
        "problems": list(found.problems),
        "compile_seconds": found.compile_seconds,
    }


def build(program: Program) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The program and the shapes of its arguments."""
    a = deepseek_v32().model.attention
    own = a.sparse
    assert own is not None
    queries, keys, heads, pages = program.queries, program.keys, program.heads, "pages" in program.part
    chosen = own.top_k // PAGE if pages else own.top_k
    blocks = -(-queries // PAGE) if pages else queries

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def whole(*shape: int) -> Any:
        return array(*shape, dtype=jnp.int32)

    span = Span(whole(1, queries), whole(1, queries))
    scale = (a.nope_dim + a.rope_dim) ** -0.5
    if program.part == "dense":
        of_head = [array(1, heads, keys, width) for width in (a.nope_dim, a.rope_dim, a.nope_dim)]
        args = (*of_head, array(1, keys, a.rope_dim), array(1, heads, keys, a.value_dim), whole(1, keys))
        return partial(_only_out, dense_attention, scale=scale), args
    if program.part in ("select_pages", "select_tokens"):
        q, k = array(1, queries, own.index_heads, own.index_dim), array(1, keys, own.index_dim)
        weight = array(1, queries, own.index_heads, dtype=jnp.float32)
        return partial(_selected, select_pages if pages else select_tokens, chosen), (q, k, weight, span)
    of_query = array(1, queries, heads, a.nope_dim), array(1, queries, heads, a.rope_dim)
    ups = array(a.kv_rank, heads, a.nope_dim), array(a.kv_rank, heads, a.value_dim)
    selected = Selected(whole(1, blocks, chosen), whole(1, blocks))
    latent = array(1, keys, a.kv_rank + a.rope_dim)
    return partial(_only_out, sparse_mla, scale=scale, pages=pages), (*of_query, *ups, latent, selected, span)


def drawn(program: Program, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with integers that mean something: every query sees all keys up to its own, the last query the last key; chosen keys are
    drawn at random from all, a chunk's at the end of the keys.
    """
    if program.part == "dense":
        return args
    stop = jnp.arange(program.keys - program.queries, program.keys, dtype=jnp.int32)[None] + 1
    span = Span(jnp.zeros_like(stop), stop)
    if program.part.startswith("select"):
        return (*args[:-1], span)
    selected = args[-2]
    _, lists, chosen = selected.index.shape
    rng = np.random.default_rng(0)
    among = program.keys // PAGE if program.part == "pages" else program.keys
    index = np.array([np.sort(rng.choice(among, chosen, replace=False)) for _ in range(lists)], np.int32)[None]
    return (*args[:-2], Selected(jnp.asarray(index), jnp.full((1, lists), chosen, jnp.int32)), span)


def _only_out(attend: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return attend(*args, **named).out


def _selected(select: Callable[..., Any], chosen: int, *args: Any) -> Any:
    return select(*args, chosen)
