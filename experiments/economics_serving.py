"""The study of economics: Engram's memory hierarchy, and what a token costs to serve."""

from mhc_jax.config import override
from mhc_jax.configs import get
from mhc_jax.configs.engram import ENGRAM
from mhc_jax.experiments.document import Block, Heading, Paragraph, Picture, Table
from mhc_jax.experiments.economics_figures import memory_figure, serving_figure, v4_figure
from mhc_jax.experiments.published_costs import DECODE, PREFILL, K
from mhc_jax.experiments.sparse_attention_figures import short
from mhc_jax.experiments.study import to_png
from mhc_jax.plan.cost import ACCELERATORS, H800_DOLLARS
from mhc_jax.plan.flops import forward_flops
from mhc_jax.plan.serving import Service, compute_seconds
from mhc_jax.plan.traffic import LEVELS, Rows, engram_rows

CHIPS = 320  # that decode together, as DeepSeek-V3's report deploys it (arXiv 2412.19437, section 3.4.2)
LENGTHS = (4 * K, 32 * K, 128 * K, 1024 * K)


def memory_blocks() -> list[Block]:
    """Which memory can feed a chip with rows."""
    tables = {
        "engram_27b, bfloat16": engram_rows(ENGRAM["27b"]),
        "V4.1-Flash, float8": engram_rows(ENGRAM["v4.1-flash"], number_bytes=1, scale_every=32),
    }
    prefill = 1 / compute_seconds(forward_flops(get("v3_671b"), 4 * K), ACCELERATORS["H800"])
    needs = {  # published: arXiv 2505.09343, Table 4; arXiv 2601.07372, Table 4
        "V3 in training, 1.5K (published)": 1543.0,
        "a 4B model serving, 9.0K (published)": 9031.0,
        f"V3 in prefill, {prefill / 1e3:.0f}K (roofline)": prefill,
    }
    return [
        Heading("Engram's memory hierarchy"),
        Picture(
            "figures/engram_memory.png",
            "What each memory can feed",
            "Left: tokens a second whose rows a memory delivers to one chip, every row read alone; orange is what a chip asks for. Even a "
            "drive is fast enough for training: tables cost room, not bandwidth. Right: what a cache of the hottest rows would leave to "
            "the slower memory, were reads distributed so.",
            to_png(lambda: memory_figure(tables, needs)),
        ),
        _rows_table(tables),
    ]


def _rows_table(tables: dict[str, Rows]) -> Table:
    chip = ACCELERATORS["H800"]
    rows = []
    for name, own in tables.items():
        room = own.table_bytes / chip.hbm_bytes
        feeds = [f"{level.tokens_per_second(own) / 1e3:,.0f}K" for level in LEVELS]
        size = [f"{own.table_bytes / 1e9:.0f} GB", f"{room:.2f}, {room * H800_DOLLARS:.2f} dollars an hour"]
        rows.append([name, f"{own.rows} of {own.row_bytes:g} bytes", *size, *feeds])
    header = ["tables", "rows of a token", "size", "H800s that would hold them", *(f"tokens/s from {level.name}" for level in LEVELS)]
    return Table(header, rows, words=True)


def serving_blocks() -> list[Block]:
    """The roofline of prefill and decoding, dense and sparse; V4 beside V3.2."""
    sparse = get("deepseek_v32")
    dense = override(sparse, {"model.attention.sparse": None})
    chip = ACCELERATORS["H800"]
    services = {name: Service(config, chip, CHIPS, H800_DOLLARS) for name, config in (("dense", dense), ("sparse", sparse))}
    return [
        Heading("Serving"),
        Picture(
            "figures/serving.png",
            "Price of a token over its context",
            f"Dashed: the roofline, the least a token can cost on {CHIPS} H800 at 2 dollars an hour with as many sequences as fit. Solid: "
            "DeepSeek's published cost of V3.1-Terminus (dense) and V3.2-Exp (sparse).",
            to_png(lambda: serving_figure(services)),
        ),
        serving_table(services),
        Paragraph(
            "Dollars a million tokens, roofline, and published in brackets; a token sees so many tokens. A service that decodes several "
            "tokens at a time (V3's own multi-token prediction) reads weights and caches less often than the roofline of one."
        ),
        Picture(
            "figures/v4.png",
            "DeepSeek-V4 against V3.2",
            "Counted from the released configs. V4's saving is one of long contexts: at 1M tokens a decoded token takes 27 % (Pro) and 10 "
            "% (Flash) of V3.2's FLOPs, at 4K 80 % and 21 %.",
            to_png(lambda: v4_figure(dense, sparse)),
        ),
    ]


def serving_table(services: dict[str, Service]) -> Table:
    """Rooflines and published prices at a few lengths."""
    rows = []
    for length in LENGTHS:
        cells = [short(length)]
        for service, prefill, decode in zip(services.values(), (PREFILL.dense, PREFILL.sparse), (DECODE.dense, DECODE.sparse)):
            for ours, published in ((service.prefill_dollars(length), prefill), (service.decode_dollars(length), decode)):
                cells.append(f"{ours:.3f}" + (f" ({published(length):.3f})" if length <= 128 * K else ""))
            cells.append(f"{service.decode(length).batch / CHIPS:,.1f}")
        rows.append(cells)
    return Table(["tokens", *(f"{name} {what}" for name in services for what in ("prefill", "decoding", "sequences a chip"))], rows)
