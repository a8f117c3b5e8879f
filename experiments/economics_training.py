"""The study of economics: what training costs, and what each of the three ideas adds and saves."""

from typing import Any

from mhc_jax.config import Config, override
from mhc_jax.configs import get
from mhc_jax.configs.engram import ENGRAM
from mhc_jax.experiments.document import Block, Heading, Paragraph, Picture, Table
from mhc_jax.experiments.economics_checks import MAXTEXT, V3_MFU, V3_TOKENS, v3_bill
from mhc_jax.experiments.economics_figures import ideas_figure, shares_figure, training_figure
from mhc_jax.experiments.published_costs import DECODE, PREFILL, K
from mhc_jax.experiments.sparse_attention_figures import short
from mhc_jax.experiments.study import to_png
from mhc_jax.nn.count import count_parameters
from mhc_jax.plan.cost import ACCELERATORS, H800_DOLLARS, matching_price, training_bill, utilisation
from mhc_jax.plan.flops import cache_row, forward_flops, table, training_flops
from mhc_jax.plan.traffic import stream_traffic
from mhc_jax.plan.v4 import FLASH, PRO
from mhc_jax.sparse_config import SparseConfig

LENGTHS = (4 * K, 32 * K, 128 * K, 1024 * K)


def variants() -> dict[str, Config]:
    """DeepSeek-V3 with each idea alone and with all three, nothing else changed."""
    changes: dict[str, dict[str, Any]] = {
        "mHC": {"model.residual": "mhc"},
        "Engram": {"model.engram": ENGRAM["v4.1-flash"]},
        "sparse attention": {"model.attention.sparse": SparseConfig()},
    }
    base = get("v3_671b")
    own = {name: override(base, change) for name, change in changes.items()}
    return own | {"all three": override(base, {path: value for change in changes.values() for path, value in change.items()})}


def stream_shares(config: Config) -> dict[str, float]:
    """Seconds of a token's stream traffic on an H800, over those of its forward pass at V3's MFU, for every way to move four streams."""
    m, chip = config.model, ACCELERATORS["H800"]
    forward = forward_flops(config, 4 * K).total / (chip.flops_per_second * V3_MFU)
    names = {"unfused": "separate, 34 C", "fused": "fused, 18 C", "seam": "one seam, 10 C", "plain": "plain, 3 C"}
    traffic = stream_traffic(m.connections.streams)
    site = 2 * m.dim / chip.hbm_bytes_per_second / forward  # of C numbers in bfloat16
    return {label: 2 * m.num_layers * traffic[way] * site for way, label in names.items()}


def training_blocks() -> list[Block]:
    """Dollars over size and tokens; other chips; where the FLOPs go."""
    runs = {label: (count_parameters(get(name).model).active, tokens(name)) for label, name in RUNS.items()}
    runs |= {"V4-Flash": (FLASH.active_parameters, 32e12), "V4-Pro": (PRO.active_parameters, 33e12)}
    flops = {f"{name}, {short(length)}": training_flops(get(name), length) for name in ("v3_671b", "moe_1t") for length in LENGTHS[:3]}
    return [
        Heading("Training"),
        Picture(
            "figures/training.png",
            "Cost of a training run",
            "Lines of equal cost. Attention scores are not in 6 FLOPs a parameter; at 4K tokens they add a seventh to DeepSeek-V3.",
            to_png(lambda: training_figure(runs, V3_MFU, H800_DOLLARS)),
        ),
        bills_table(),
        Paragraph(
            f"DeepSeek-V3's {V3_TOKENS / 1e12:g}T tokens on other chips: at V3's own MFU of {100 * V3_MFU:.1f} % of the bfloat16 peak and, "
            "for two TPUs, at the tokens a second published with MaxText's recipes. The last column is the price of an hour at which the "
            "run costs what it does on H800 at 2 dollars."
        ),
        Picture(
            "figures/shares.png",
            "Where the FLOPs of training go",
            "A token in training, by part, at three lengths of a sequence: `v3_671b` with dense attention, `moe_1t` with all three ideas.",
            to_png(lambda: shares_figure(flops)),
        ),
        Table(*table(flops)),
        Paragraph("GFLOP a token, forward and backward."),
    ]


RUNS = {"3b": "3b", "9b": "9b", "27b": "27b", "3b_1t": "3b_1t", "DeepSeek-V3": "v3_671b", "moe_1t": "moe_1t"}  # as drawn, and as configs


def tokens(name: str) -> float:
    """That a named config trains on."""
    return float(get(name).tokens_per_step * get(name).train.steps)


def bills_table() -> Table:
    """DeepSeek-V3's pre-training on every chip."""
    flops, reference = training_flops(get("v3_671b"), 4 * K).total, v3_bill()
    rows = []
    for name, chip in ACCELERATORS.items():
        cases = {"V3's": V3_MFU}
        if name in MAXTEXT:
            cases["published"] = utilisation(flops, MAXTEXT[name][0], chip)
        for source, mfu in cases.items():
            bill = training_bill(flops, V3_TOKENS, chip, mfu=mfu, dollars_per_hour=0)
            cells = [f"{chip.flops_per_second / 1e12:,.0f}", f"{source}, {100 * mfu:.1f} %", f"{bill.chip_hours / 1e6:.2f}M"]
            rows.append([name, *cells, f"{bill.days(2048):,.0f}", f"{matching_price(bill, reference.dollars):.2f}"])
    return Table(["chip", "peak, TFLOP/s", "MFU", "chip hours", "days on 2048 chips", "dollars an hour that match"], rows)


def ideas_blocks() -> list[Block]:
    """The price of mHC, Engram and sparse attention, and what is published of what they save."""
    base, own = get("v3_671b"), variants()
    shapes = {"DeepSeek-V3's shape": base, "27B, mHC's paper": override(get("27b"), {"model.residual": "residual"})}
    streams = {name: stream_shares(config) for name, config in shapes.items()}
    rows = []
    for name, config in own.items():
        cells = [f"{100 * (training_flops(config, t).total / training_flops(base, t).total - 1):+.1f} %" for t in LENGTHS]
        added = count_parameters(config.model).total - count_parameters(base.model).total
        row = cache_row(config, "float8").total / cache_row(base, "float8").total - 1
        rows.append([name, *cells, f"{added / 1e9:+.2f}B", f"{100 * row:+.0f} %"])
    return [
        Heading("What each idea costs and saves"),
        Picture(
            "figures/ideas.png",
            "Price of the three ideas",
            "Left: FLOPs of a token in training against the same model without; mHC's and Engram's lines lie near 1. Right: what mHC costs "
            "instead is memory traffic: the time of the streams' reads and writes at an H800's bandwidth over the time of a forward pass "
            f"at 4K tokens and {100 * V3_MFU:.0f} % MFU, nothing overlapped, as separate operations (34 C), as the paper's fused kernels "
            "(18 C), in one pass a seam (10 C), and with a plain residual (3 C).",
            to_png(lambda: ideas_figure(base, own, streams)),
        ),
        Table(["DeepSeek-V3 with", *(f"FLOPs, {short(t)}" for t in LENGTHS), "parameters", "cache a token"], rows),
        savings_table({name: shares["one seam, 10 C"] - shares["plain, 3 C"] for name, shares in streams.items()}),
        Paragraph(
            "What mHC and Engram save was published of other models than this one; whether it carries over to 671B parameters and 14.8T "
            "tokens nobody has shown, so it is not turned into dollars here."
        ),
    ]


def savings_table(streams: dict[str, float]) -> Table:
    """What each idea costs here, and what it is said to save; `streams`: time that mHC's traffic adds to a forward pass, by shape."""
    added = " to ".join(f"{100 * share:.1f}" for share in streams.values())
    prefill, decode = PREFILL.ratio(128 * K), DECODE.ratio(128 * K)
    rows = [
        [
            "mHC",
            f"0.3 % of FLOPs, {added} % of a forward pass in traffic (one seam; DeepSeek-V3's shape, 27B)",
            "21 % of compute to an equal loss (arXiv 2607.14530: 1.19 for 1.50 times its own); 0.021 nats at 27B (arXiv 2512.24880)",
        ],
        [
            "Engram",
            "0.4 % of FLOPs, 197B parameters outside the chips' memory",
            "8 % of the steps to an equal loss (46K for 50K), 0.012 nats at 27B, parameters and FLOPs equal (arXiv 2601.07372)",
        ],
        [
            "sparse attention",
            "22 % of FLOPs at 4K, 20 % of the cache",
            f"67 % of FLOPs in training at 128K; {prefill:.1f} times in prefill and {decode:.1f} in decoding at 128K (arXiv 2512.02556)",
        ],
    ]
    return Table(["idea", "costs (counted)", "saves (FLOPs counted, the rest published)"], rows, words=True)
