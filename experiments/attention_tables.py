"""What was modelled or measured of attention, as the blocks of a report: figure, times, memory, and what could not be modelled."""

from collections.abc import Mapping
from typing import Any

from mhc_jax.experiments.attention_memory import LAYERS
from mhc_jax.experiments.attention_modelled import MEASURED, MODELLED, K
from mhc_jax.experiments.attention_times import Times
from mhc_jax.experiments.document import Block, Heading, Items, Paragraph, Picture, Table
from mhc_jax.experiments.formats import NONE, mebibytes, significant
from mhc_jax.experiments.sparse_attention_figures import short, times_figure
from mhc_jax.experiments.study import to_png

LENGTHS = (8 * K, 32 * K, 128 * K)


def chip(topology: str) -> str:
    """v6e of v6e:2x2."""
    return topology.partition(":")[0]


def times_blocks(found: Mapping[str, Any], how: str) -> list[Block]:
    """Times that were "modelled" or "measured", by topology or device; nothing where there are none."""
    sizes = {"modelled": MODELLED, "measured": MEASURED}[how]
    times = {chip(name): Times(own, sizes) for name, own in found.items()}
    times = {name: own for name, own in times.items() if any(total(1.0) is not None for total in (own.dense, own.pages, own.tokens))}
    blocks: list[Block] = []
    if times:
        picture = to_png(lambda: times_figure(times, how))
        source = {"modelled": "read off the compiler's schedule for chips that are not here", "measured": "on this machine"}[how]
        reading = (
            f"Microseconds a token of a whole sequence, forward, one layer, {source}. Points were {how} (dense "
            f"attention for {sizes.dense_heads} heads), lines go through them by their laws of growth. A vertical line is a break-even."
        )
        blocks += [Heading(how.capitalize()), Picture(f"figures/{how}.png", f"Time of a token, {how}", reading, picture)]
        blocks.append(times_table(times))
    problems = [
        f"{chip(name)}, {key}: {record['problems'][0]}" for name, own in found.items() for key, record in own.items() if record["problems"]
    ]
    return [*blocks, Paragraph(f"Without a valid figure, {how}:"), Items(problems)] if problems else blocks


def memory_blocks(memory: Mapping[str, Any]) -> list[Block]:
    """Temporaries by the compiler; nothing where there are none."""
    if not memory:
        return []
    said = "Temporaries of one layer's choice of keys and attention to them, beside arguments and results, by the TPU compiler."
    return [Heading("Memory"), memory_table(memory), Paragraph(said)]


def times_table(times: Mapping[str, Times]) -> Table:
    """Milliseconds of a whole sequence, shares of dense attention, and break-evens."""
    rows = []
    for name, own in times.items():
        for length in LENGTHS:
            dense, found = own.dense(length), [own.pages(length), own.tokens(length)]
            cells = [_milliseconds(us) + (f" ({us / dense:.0%})" if us and dense else "") for us in found]
            rows.append([f"{name}, {short(length)}", _milliseconds(dense), *cells])
        for what, found_at in (("whole sequences", own.break_even), ("one more token", own.position)):
            crossings = [found_at(granularity) for granularity in ("pages", "tokens")]
            rows.append([f"{name}, break-even of {what}", "", *(NONE if here is None else short(here) for here in crossings)])
    return Table(["chip and sequence", "dense, ms", "pages with choice, ms", "tokens with choice, ms"], rows)


def memory_table(memory: Mapping[str, Any]) -> Table:
    """Temporaries of every layer on every chip."""
    rows = []
    for layer in LAYERS:
        what = (
            f"{layer.granularity}, {short(layer.queries)} queries of {short(layer.keys)} keys{', with gradient' if layer.backward else ''}"
        )
        found = [own.get(layer.key) for own in memory.values()]
        rows.append([what, *(mebibytes(size) if isinstance(size, int) else "refused" if size else NONE for size in found)])
    return Table(["layer", *map(chip, memory)], rows)


def _milliseconds(us: float | None) -> str:
    return NONE if us is None else significant(us / 1e3)
