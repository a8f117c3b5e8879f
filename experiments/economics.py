"""What does a model cost to train and to serve, and what do mHC, Engram and sparse attention add and save? `mhc-jax study economics`.

Arithmetic from configs (`mhc_jax.plan`), held against published numbers (`economics_checks`). Nothing is compiled or measured.
"""

from collections.abc import Sequence

from mhc_jax.experiments.document import Block, Code, Heading, Paragraph, Table
from mhc_jax.experiments.economics_checks import V3_MFU, Check, checks, extension_bill
from mhc_jax.experiments.economics_serving import memory_blocks, serving_blocks
from mhc_jax.experiments.economics_training import ideas_blocks, training_blocks
from mhc_jax.experiments.study import Say, write_study
from mhc_jax.files import AnyPath

NAME = "economics"
TITLE = "Economics of DeepSeek-V3's shape, with mHC, Engram and sparse attention"


def run(folder: AnyPath, command: str, say: Say) -> None:
    """Writes the report, in seconds."""
    blocks = [*checks_blocks(), *training_blocks(), *ideas_blocks(), *memory_blocks(), *serving_blocks()]
    write_study(folder, TITLE, [*blocks, Heading("To run it again"), Code(command)], say)


def checks_blocks() -> list[Block]:
    """The arithmetic beside what was published."""
    extension = extension_bill().chip_hours
    return [
        Paragraph(
            "Everything here is counted from configs: FLOPs by one formula (`mhc_jax/plan/flops.py`), bytes by shapes. Published numbers "
            "are named as such. The MFU of DeepSeek-V3 was published of the run whose hours it is multiplied with here, so that the hours "
            "test the count of FLOPs and nothing else."
        ),
        Heading("Held against published numbers"),
        checks_table(checks()),
        Paragraph(
            f"The two phases that lengthen V3's context would take {extension / 1e3:.0f}K hours at the MFU of 4K sequences; they took "
            f"119K, which is an MFU of {100 * V3_MFU * extension / 119e3:.0f} %. V4's ratio of FLOPs depends a little on what a 16-bit "
            "FLOP counts: 26.2 % for Pro if every FLOP counts alike, 26.6 % if one in 8 bits counts 1, in 16 bits 2 and in 4 bits a half."
        ),
    ]


def checks_table(found: Sequence[Check]) -> Table:
    """Every number, here and published."""
    rows = []
    for check in found:
        verdict = "not a check" if check.tolerance is None else "yes" if check.passes else "NO"
        numbers = [_significant(check.counted), _significant(check.published)]
        rows.append([check.what, *numbers, check.unit, f"{100 * check.off:+.1f} %", verdict, check.source])
    return Table(["what", "counted", "published", "unit", "off", "within tolerance", "source"], rows, words=True)


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
