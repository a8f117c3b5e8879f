"""Does mHC's gain hold over scale? A sweep over size and compute that a laptop finishes: the list `scaling_laptop`.

Five sizes at three budgets of compute (IsoFLOP, arXiv 2203.15556, section 3.2), each with the plain residual and with mHC, two seeds. What
its runs say together is scaling_report's part.

A budget is FLOPs of the plain residual's training, counted by `plan.flops`; mHC gets the same tokens, so its runs cost more (its mappings
and its mixing are counted) and the two differ in the residual connection alone. Every run is trained for its own budget: warm-up and both
drops of the learning rate are shares of its own steps, no run is read at several.

The best size of a budget should lie between the sizes. At 3e11 FLOPs it was found near 32 thousand active parameters (held-out losses of
3.873, 3.845 and 3.991 nats at widths 24, 32 and 48), so they reach from 14 to 122 thousand. The largest budget is what the smallest size
can take of the standard library's text without seeing a token twice. 512 token ids keep the output head, which widens with the body
alone, at 58 % of the active parameters for the smallest size and 27 % for the largest; with the 1024 of `laptop` it would be most of the
model. Batches stay those of `laptop`: halving and quartering them gained nothing.
"""

from dataclasses import dataclass

from mhc_jax.config import Config, override
from mhc_jax.configs.laptop import laptop
from mhc_jax.experiments.runs import Run, RunList
from mhc_jax.plan.flops import training_flops

NAME = "scaling_laptop"
KINDS = ("residual", "mhc")
BUDGETS = (9e10, 2.2e11, 5.4e11)  # FLOPs of the plain residual's training
SEEDS = 2
VOCABULARY = 512
RATE = 0.192  # learning rate times width: the best of half, once and twice that at widths 32 and 64


@dataclass(frozen=True)
class Size:
    """Width and depth; everything else follows."""

    dim: int
    layers: int

    @property
    def name(self) -> str:
        return f"{self.dim}x{self.layers}"


SIZES = tuple(Size(width, 2) for width in (16, 24, 32, 48, 64))


def sized(size: Size, kind: str, budget: float) -> Config:
    """The config of one size and kind, trained for the tokens that `budget` pays for without extra streams.

    Learning rate and initial weights fall with the width (as 1/C and C^-1/2), so that no size is favoured by one rate for all.
    """
    c = size.dim
    changes = {
        "name": NAME,
        "model.residual": kind,
        "model.vocab_size": VOCABULARY,
        "model.dim": c,
        "model.num_layers": size.layers,
        "model.dense_dim": 3 * c,
        "model.attention.num_heads": c // 16,
        "model.attention.nope_dim": 8,
        "model.attention.rope_dim": 8,
        "model.attention.value_dim": 16,
        "model.attention.kv_rank": c // 2,
        "model.moe.num_experts": 4,
        "model.moe.top_k": 1,
        "model.moe.expert_dim": c,
        "model.init_std": round(0.7 / c**0.5, 3),
        "optimizer.learning_rate": RATE / c,
    }
    config = override(laptop(), changes)
    plain = override(config, {"model.residual": "residual"})
    half = round(budget / (training_flops(plain, plain.data.seq_len).total * plain.tokens_per_step) / 2)
    schedule = {
        "optimizer.warmup_steps": half // 5,  # a tenth of the run
        "train.steps": 2 * half,
        "train.eval_every": half,
        "train.checkpoint_every": half,
        # Differences of a hundredth of a nat are asked about, and the text is the same for all runs.
        "train.eval_sequences": 256,
    }
    return override(config, schedule)


def scaling_laptop() -> RunList:
    """The list of `mhc-jax ablate scaling_laptop`: by seed, then by budget, so that a list cut short holds complete profiles."""
    runs = []
    for seed in range(SEEDS):
        for budget in BUDGETS:
            for size in SIZES:
                for kind in KINDS:
                    variant = f"{kind} {size.name} {budget:.1e}".replace("e+", "e")
                    config = override(sized(size, kind, budget), {"train.seed": seed})
                    runs.append(Run(f"{variant.replace(' ', '-')}-seed{seed}", variant, config))
    question = (
        "How does the held-out loss fall with parameters, tokens and compute, with the plain residual and with mHC, and does the gap "
        f"between them close as compute grows? {len(SIZES)} sizes at {len(BUDGETS)} budgets, {SEEDS} seeds; a variant is named by its "
        "residual kind, width x layers, and the FLOPs that the plain residual takes for its tokens."
    )
    return RunList(NAME, question, tuple(runs), None)
