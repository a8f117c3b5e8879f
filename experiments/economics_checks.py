"""What this library's arithmetic gives beside what was published, number by number: the table of docs/economics.md, and a test."""

from dataclasses import dataclass

from mhc_jax.config import Config, override
from mhc_jax.configs import get
from mhc_jax.configs.engram import ENGRAM
from mhc_jax.experiments.published_costs import DECODE, PREFILL, K, priced
from mhc_jax.nn.count import count_parameters
from mhc_jax.plan.attention import decode_counts, expanded, prefill_counts
from mhc_jax.plan.cost import ACCELERATORS, H800_DOLLARS, Bill, training_bill, utilisation
from mhc_jax.plan.flops import cache_bytes, decode_flops, training_flops
from mhc_jax.plan.traffic import best_block, engram_rows, kept_streams, stream_traffic
from mhc_jax.plan.v4 import FLASH, PRO, V4, V4_WEIGHTS, V32_WEIGHTS

V3_TOKENS = 14.8e12  # arXiv 2412.19437
V3_MFU = 0.3894  # causal; arXiv 2505.09343, Table 4: 385 of 989 TFLOP/s
# DeepSeek-V3 with MaxText in bfloat16, 4096 tokens (AI-Hypercomputer/tpu-recipes): tokens a second and chip, and TFLOP/s as it tells them.
MAXTEXT = {"tpu7x": (2426, 607.5), "v5p": (542, 152.4)}
V3_GPUS, V3_TOKENS_PER_DAY = 2048, 272.80e9  # the same table
# The two phases that lengthen the context (arXiv 2412.19437, section 4.3): length, and steps times sequences.
V3_PHASES = ((32 * K, 1000 * 1920), (128 * K, 1000 * 480))
M = 1024 * K


@dataclass(frozen=True)
class Check:
    """One number, here and published."""

    what: str
    counted: float
    published: float
    unit: str
    tolerance: float | None  # largest relative difference that passes; None: nothing says that the two must agree, and `source` says why
    source: str

    @property
    def off(self) -> float:
        """Relative difference."""
        return self.counted / self.published - 1

    @property
    def passes(self) -> bool:
        return self.tolerance is None or abs(self.off) <= self.tolerance


def checks() -> tuple[Check, ...]:
    """All of them, in the order of the table."""
    return (*_deepseek_v3(), *_sparse(), *_v4(PRO, 0.27, 0.10, 1.6e12, 49e9), *_v4(FLASH, 0.10, 0.07, 284e9, 13e9), *_traffic())


def deepseek_v2() -> Config:
    """The shape of DeepSeek-V2 (arXiv 2405.04434), for its published FLOPs."""
    moe = {"num_experts": 160, "shared_experts": 2, "top_k": 6, "expert_dim": 1536, "top_groups": 3}
    model = {"num_layers": 60, "dense_layers": 1, "dim": 5120, "dense_dim": 12_288, "vocab_size": 102_400}
    return override(get("v3_671b"), {f"model.{k}": v for k, v in model.items()} | {f"model.moe.{k}": v for k, v in moe.items()})


def v3_bill(tokens: float = V3_TOKENS, length: int = 4 * K) -> Bill:
    """DeepSeek-V3 on H800s at its own MFU and its own price."""
    flops = training_flops(get("v3_671b"), length).total
    return training_bill(flops, tokens, ACCELERATORS["H800"], mfu=V3_MFU, dollars_per_hour=H800_DOLLARS)


def extension_bill() -> Bill:
    """Both phases that lengthen the context, at the MFU of pre-training."""
    bills = [v3_bill(length * sequences, length) for length, sequences in V3_PHASES]
    return Bill(sum(bill.flops for bill in bills), sum(bill.chip_hours for bill in bills), sum(bill.dollars for bill in bills))


def _deepseek_v3() -> list[Check]:
    config, h800 = get("v3_671b"), ACCELERATORS["H800"]
    model, count = config.model, count_parameters(config.model)
    flops = training_flops(config, 4 * K).total
    # Without causality every token sees all 4096.
    full = flops + 3 * model.num_layers * expanded(model.attention).flops_per_key * (4 * K - 1) / 2
    per_gpu = V3_TOKENS_PER_DAY / 86_400 / V3_GPUS
    bill, table1, table4 = v3_bill(), "arXiv 2412.19437, Table 1", "arXiv 2505.09343, Table 4"
    total = bill.chip_hours + 0.124e6
    return [
        Check("DeepSeek-V3, parameters", count.total / 1e9, 671, "B", 0.01, "released config.json"),
        Check(
            "DeepSeek-V3, active parameters",
            count.active / 1e9,
            36.7,
            "B",
            0.01,
            "README_WEIGHTS of the release; input embedding not counted",
        ),
        Check(
            "DeepSeek-V3, training a token",
            flops / 1e9,
            250,
            "GFLOP",
            0.01,
            "arXiv 2505.09343, Table 2: forward and backward, 4096 tokens, causal, no MTP",
        ),
        Check("DeepSeek-V2, training a token", training_flops(deepseek_v2(), 4 * K).total / 1e9, 155, "GFLOP", 0.01, "the same table"),
        Check(
            "DeepSeek-V3, MFU, causal",
            100 * utilisation(flops, per_gpu, h800),
            38.94,
            "%",
            0.01,
            f"{table4}: 272.80B tokens a day on 2048 GPUs",
        ),
        Check("DeepSeek-V3, MFU, not causal", 100 * utilisation(full, per_gpu, h800), 43.73, "%", 0.01, table4),
        Check(
            "DeepSeek-V3, pre-training", bill.chip_hours / 1e6, 2.664, "M H800 hours", 0.03, f"{table1}; the MFU is that of the same run"
        ),
        Check("DeepSeek-V3, pre-training", bill.dollars / 1e6, 5.328, "M dollars", 0.03, f"{table1}, at 2 dollars an hour"),
        Check(
            "DeepSeek-V3, all of it",
            total / 1e6,
            2.788,
            "M H800 hours",
            0.03,
            f"{table1}; 0.119M for the context and 0.005M after it taken as published",
        ),
        Check("DeepSeek-V3, all of it", total * H800_DOLLARS / 1e6, 5.576, "M dollars", 0.03, table1),
        *(
            Check(f"DeepSeek-V3 with MaxText on {chip}", MAXTEXT[chip][0] * counted / 1e12, MAXTEXT[chip][1], "TFLOP/s a chip", 0.01, how)
            for chip, counted, how in (("tpu7x", flops, "its recipe, from tokens a second"), ("v5p", full, "the same; not causal"))
        ),
        Check(
            "DeepSeek-V3, longer context",
            extension_bill().chip_hours / 1e6,
            0.119,
            "M H800 hours",
            None,
            f"{table1}; counted at the MFU of 4K sequences, which it did not reach",
        ),
    ]


def _sparse() -> list[Check]:
    config, source = get("deepseek_v32"), "arXiv 2512.02556, read off its figure; counted at the dense line's price of a FLOP"
    found = []
    for name, counts, curves in (("prefill", prefill_counts(config), PREFILL), ("decoding", decode_counts(config), DECODE)):
        dollars = priced(counts, curves, config.model.num_layers, counts.least_flops)(128 * K)
        found.append(Check(f"V3.2 {name} at 128K, a million tokens", dollars, curves.sparse(128 * K), "dollars", 0.15, source))
    cheaper = PREFILL.dense(128 * K) / found[0].counted, DECODE.dense(128 * K) / found[1].counted
    for name, ratio, curves in zip(("prefill", "decoding"), cheaper, (PREFILL, DECODE)):
        found.append(Check(f"V3.2 {name} at 128K, dense over sparse", ratio, curves.ratio(128 * K), "times", 0.15, "the same"))
    return found


def _v4(model: V4, flops: float, cache: float, parameters: float, active: float) -> list[Check]:
    config = get("deepseek_v32")
    ours = model.decode_flops(M).weighted(V4_WEIGHTS) / decode_flops(config, M - 1).weighted(V32_WEIGHTS)
    kept = model.cache_bytes(M) / cache_bytes(config, M, "float8")
    source = "arXiv 2606.19348, published as a whole percent"
    # Half a percent is what rounding hides.
    return [
        Check(f"{model.name}, parameters", model.parameters / 1e9, parameters / 1e9, "B", 0.02, "arXiv 2606.19348"),
        Check(
            f"{model.name}, active parameters",
            model.active_parameters / 1e9,
            active / 1e9,
            "B",
            0.025,
            "arXiv 2606.19348; input embedding not counted",
        ),
        Check(
            f"{model.name} at 1M, FLOPs of a decoded token over V3.2's",
            100 * ours,
            100 * flops,
            "%",
            0.005 / flops,
            f"{source}; an 8-bit FLOP counts 1",
        ),
        Check(f"{model.name} at 1M, cache over V3.2's", 100 * kept, 100 * cache, "%", 0.005 / cache, source),
    ]


def _traffic() -> list[Check]:
    traffic, rows = stream_traffic(4), engram_rows(ENGRAM["v4.1-flash"], number_bytes=1, scale_every=32)
    exact, paper = 1e-9, "arXiv 2512.24880"
    return [
        Check("streams, separate operations", traffic["unfused"], 34, "C a token and sublayer", exact, f"{paper}, Table 2, n = 4"),
        Check(
            "streams, mHC's fused kernels",
            traffic["fused"],
            18,
            "C a token and sublayer",
            exact,
            f"{paper}, Table 2 and its fused kernels, added up",
        ),
        Check(
            "streams, one pass a seam",
            traffic["seam"],
            10,
            "C a token and sublayer",
            exact,
            "V4.1's report, (2n+2) C; what this library's kernels move",
        ),
        Check(
            "streams kept for 60 sublayers",
            kept_streams(4, 60, best_block(4, 60)),
            76,
            "C a token",
            exact,
            f"{paper}, Eq. 20, at its best block of 6",
        ),
        Check(
            "V4.1-Flash, Engram's rows of a token",
            rows.bytes / 1e3,
            12.7,
            "kB",
            0.01,
            "DeepSeek-V4.1's release: float8 with a scale for each 32",
        ),
        Check("V4.1-Flash, Engram's tables", rows.table_bytes / 1e9, 203, "GB", 0.01, "the same"),
    ]
