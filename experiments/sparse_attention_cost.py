"""What does sparse attention cost over the position of a token, beside dense attention? The study `mhc-jax study sparse_attention_cost`.

Counted from DeepSeek-V3.2's config, held against what DeepSeek published of its service, and modelled for TPUs by their compiler.
"""

from collections.abc import Sequence

from mhc_jax.configs.sparse import deepseek_v32
from mhc_jax.experiments.attention_memory import weigh_all
from mhc_jax.experiments.attention_modelled import measure_all, model_all
from mhc_jax.experiments.attention_tables import memory_blocks, times_blocks
from mhc_jax.experiments.document import Block, Code, Heading, Items, Paragraph, Picture, Table
from mhc_jax.experiments.published_costs import DECODE, PREFILL, SOURCE, K, Published, rate
from mhc_jax.experiments.sparse_attention_figures import counted_figure, published_figure, short
from mhc_jax.experiments.study import Say, to_png, write_study
from mhc_jax.files import AnyPath
from mhc_jax.plan.attention import Counts, decode_counts, prefill_counts

NAME = "sparse_attention_cost"
LENGTHS = (4 * K, 32 * K, 128 * K, 1024 * K)


def run(folder: AnyPath, command: str, say: Say) -> None:
    """Writes the report with what is counted, and again when the rest is modelled, which may take an hour the first time."""
    counted = counted_blocks()

    def write(blocks: Sequence[Block], say: Say) -> None:
        write_study(folder, "Cost of sparse attention over position", [*counted, *blocks, Code(command)], say)

    write([], lambda line: None)
    measured = times_blocks(measure_all(folder, say), "measured")
    memory = memory_blocks(weigh_all(folder, say))
    write([*times_blocks(model_all(folder, say), "modelled"), *measured, *memory], say)


def counted_blocks() -> list[Block]:
    """The part that is arithmetic: counts, and the published curves."""
    config = deepseek_v32()
    counts = {"prefill": prefill_counts(config), "decoding": decode_counts(config)}
    layers = config.model.num_layers
    counted = to_png(lambda: counted_figure(counts))
    published = to_png(lambda: published_figure(counts, layers))
    return [
        Paragraph(
            "Dense latent attention against DeepSeek Sparse Attention at DeepSeek-V3.2's shape: 128 heads, latents of 512 + 64 numbers, an "
            "indexer of 64 heads of 128, 2048 chosen keys, 61 layers. Projections and experts, which both have, are left out of counts."
        ),
        Heading("Counted"),
        Picture(
            "figures/counted.png",
            "FLOPs of one token over its position",
            "FLOPs of one token in one layer, counted from the config. Attention to chosen keys is flat beyond 2048 of them; the indexer, "
            "which scores every earlier key, is what grows; where blue falls below grey, sparse attention does less work.",
            counted,
        ),
        totals_table(counts["prefill"]),
        Paragraph("A whole sequence in one layer, forward, causal: TFLOP, and the rows of latents that token by token selection gathers."),
        bytes_table(counts["decoding"]),
        Paragraph(
            "Bytes of keys that HBM moves to decode one token of one sequence in one layer, counted; every sequence has its own keys."
        ),
        crossings_table(counts),
        Heading("Published"),
        Picture(
            "figures/published.png",
            "Published cost of a token over its position",
            "What DeepSeek reports of its own service. The dashed line is no fit of the blue one: it takes the price of a FLOP from the "
            "grey line and the FLOPs of sparse attention from the config.",
            published,
        ),
        Items([*published_items("prefill", counts["prefill"], PREFILL), *published_items("decoding", counts["decoding"], DECODE)]),
        Paragraph(f"Source: {SOURCE}. A slope gives the rate of one GPU at which it would pay for the counted FLOPs of 61 layers."),
    ]


def totals_table(counts: Counts) -> Table:
    """TFLOP of whole sequences."""
    rows = []
    for length in LENGTHS:
        dense, sparse, indexer = (part.prefill_flops(length) / 1e12 for part in (counts.dense, counts.sparse, counts.indexer))
        gathered = length * min(length, counts.sparse.most_keys or length)
        rows.append(
            [
                short(length),
                f"{dense:,.1f}",
                f"{sparse:,.1f}",
                f"{indexer:,.1f}",
                f"{dense / (sparse + indexer):.2f}",
                f"{gathered / 1e6:,.0f}M of {counts.sparse.bytes_per_key:,} bytes",
            ]
        )
    return Table(["tokens", "dense", "sparse, chosen keys", "indexer", "dense over sparse", "rows gathered"], rows)


def bytes_table(counts: Counts) -> Table:
    """Megabytes of one decoded token."""
    rows = []
    for position in LENGTHS:
        dense, sparse, indexer = (part.bytes(position - 1) / 1e6 for part in (counts.dense, counts.sparse, counts.indexer))
        cells = [f"{megabytes:,.1f} MB" for megabytes in (dense, sparse, indexer)]
        rows.append([short(position), *cells, f"{dense / (sparse + indexer):.2f}"])
    return Table(["tokens before it, itself included", "dense", "sparse, chosen keys", "indexer", "dense over sparse"], rows)


def crossings_table(counts: dict[str, Counts]) -> Table:
    """Positions where one thing becomes dearer than another."""
    prefill, decode = counts["prefill"], counts["decoding"]
    published = short(PREFILL.break_even()), short(DECODE.break_even())
    rows = [
        ["sparse attention with its indexer does fewer FLOPs than dense", short(prefill.break_even()), short(decode.break_even())],
        ["the same, published dollars", *published],
        ["masked dense attention stops being cheaper than attention to the chosen latents", short(prefill.masked_until()), "–"],
        [
            "the indexer's scores take more FLOPs than the attention to what it chose",
            short(prefill.indexer_leads()),
            short(decode.indexer_leads()),
        ],
    ]
    return Table(["from which position", "prefill", "decoding"], rows)


def published_items(name: str, counts: Counts, curves: Published) -> list[str]:
    """Sentences about one pair of published curves."""
    layers = deepseek_v32().model.num_layers
    dense = rate(curves.dense.slope(), counts.dense.flops_per_key, layers)
    indexer = rate(curves.sparse.slope(1), counts.indexer.flops_per_key, layers)
    last = 128 * K
    at_zero = curves.sparse(0) / curves.dense(0) - 1
    return [
        f"{name}: {curves.dense(last):.3f} against {curves.sparse(last):.3f} dollars a million tokens at 128K, {curves.ratio(last):.1f} "
        f"times cheaper; {100 * at_zero:.0f} % dearer at position 0, even at {short(curves.break_even())}.",
        f"{name}: the dense line's slope is that of {dense / 1e12:.0f} TFLOP/s, the sparse line's beyond its first knee that of an "
        f"indexer at {indexer / 1e12:.0f} TFLOP/s (float8 there, of which the GPU does 1979).",
    ]
