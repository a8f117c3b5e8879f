"""Plans as a table for people and as plain values for a file."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mhc_jax.config import Config
from mhc_jax.plan.collectives import KINDS
from mhc_jax.plan.parts import COLLECTIVES, OTHER, PARTS
from mhc_jax.plan.plan import Plan
from mhc_jax.plan.topologies import Machine

GIB, GB = 2**30, 1e9
LABEL = 46  # characters
COLUMN = 22
SHARES = (*PARTS.values(), OTHER, COLLECTIVES)


def render(plans: Sequence[Plan], config: Config, machine: Machine) -> str:
    """A column a residual kind."""
    per_chip = machine.devices // machine.chips
    lines = [
        f"{config.name} on {machine.name}: {machine.chips} chips of {machine.title}, {machine.devices} devices; "
        f"{config.train.batch_size} x {config.data.seq_len} tokens a step. Modelled, nothing measured (docs/plan.md).",
        "",
        _line("", [plan.residual for plan in plans]),
    ]

    def row(label: str, value: Callable[[Plan], object]) -> None:
        """A line of texts; what is no text is not known."""
        cells = [text if isinstance(text := value(plan), str) else None for plan in plans]
        if any(cell is not None for cell in cells):
            lines.append(_line(label, [cell if cell is not None else "-" for cell in cells]))

    row("parameters, total", lambda p: _count(p.parameters.total))
    row("  active for a token", lambda p: _count(p.parameters.active))
    lines += ["", "memory of a device" + (f" (1/{per_chip} of a chip)" if per_chip > 1 else " (a chip)")]
    for label, name in (("parameters", "parameters"), ("optimizer", "optimizer"), ("tables", "tables")):
        if name != "tables" or any(plan.memory.tables for plan in plans):
            row(f"  {label}", lambda p, name=name: _gib(getattr(p.memory, name)))  # type: ignore[misc]
    row("  batch and padding of layouts", lambda p: _gib(p.memory.arguments - p.memory.parameters - p.memory.optimizer - p.memory.tables))
    row("  activations, gradients, workspace", lambda p: _gib(p.memory.temporaries))
    row("  together", lambda p: _gib(p.memory.peak))
    if per_chip > 1:
        row("  together, of a chip", lambda p: _gib(p.memory.peak * per_chip))
    row(f"  fits {_gib(machine.hbm_bytes_per_device)}", lambda p: "yes" if p.fits else "NO")
    if any(plan.smallest for plan in plans) or not all(plan.fits for plan in plans):
        row("  smallest slice that would do (estimate)", lambda p: p.smallest or "none listed")

    lines += ["", "GFLOPs of a token"]
    row("  hand formula, forward and backward", lambda p: p.products and _giga(p.products.formula))
    row("  XLA's count: loops once, no Pallas kernels", lambda p: p.products and p.products.xla and _giga(p.products.xla))
    row("  products, loops multiplied, but attention's", lambda p: p.step and p.products and _giga(p.products.products))
    row("    of these recomputed", lambda p: p.step and p.products and _giga(p.products.recomputed))

    if any(plan.step for plan in plans):
        lines += ["", "a step of a device"]
    row("  HBM", lambda p: p.step and f"{sum(o.hbm_bytes for o in p.step.operations) / GB:,.1f} GB")
    for name in KINDS:
        if any(name in plan.collectives for plan in plans):
            row(f"  {name}", lambda p, name=name: _traffic(p, name))  # type: ignore[misc]
    roofline = not any(plan.step for plan in plans)
    lines += ["", "roofline: what a step takes at least" if roofline else "modelled time"]
    row("  step", lambda p: p.step_seconds and f"{p.step_seconds * 1e3:,.1f} ms")
    for name in SHARES:
        if any(plan.step and plan.step.by_part().get(name) for plan in plans):
            row(f"    {name}" + (", what is not hidden" if name == COLLECTIVES else ""), lambda p, name=name: _share(p, name))  # type: ignore[misc]
    row("  tokens a second and chip", lambda p: p.step_seconds and f"{config.tokens_per_step / p.step_seconds / machine.chips:,.0f}")
    row("  model FLOPs utilisation" + (", at most" if roofline else ""), lambda p: p.mfu and f"{p.mfu:.1%}")
    row("  overhead over the plain residual", lambda p: _overhead(p, plans))
    row("compiled in", lambda p: f"{p.compile_seconds:.0f} s")
    notes = {note for plan in plans if plan.step for note in plan.step.notes}
    return "\n".join([*lines, *(f"note: {note}" for note in sorted(notes))])


def to_json(plans: Sequence[Plan], config: Config, machine: Machine) -> dict[str, Any]:
    """Everything, the single operations included."""
    return {
        "config": config.name,
        "machine": machine.name,
        "chips": machine.chips,
        "devices": machine.devices,
        "tokens_per_step": config.tokens_per_step,
        "plans": [
            {
                **{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name not in _NESTED},
                **{name: dataclasses.asdict(part) for name in _NESTED if (part := getattr(plan, name)) is not None},
                "fits": plan.fits,
                "collectives": {kind: dataclasses.asdict(traffic) for kind, traffic in plan.collectives.items()},
                "modelled_seconds": plan.step.by_part() if plan.step else None,
            }
            for plan in plans
        ],
    }


_NESTED = ("parameters", "memory", "products", "step")


def _line(label: str, cells: Sequence[str]) -> str:
    return (label.ljust(LABEL) + "".join(cell.rjust(COLUMN) for cell in cells)).rstrip()


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e8 else f"{parameters / 1e6:.3f} M"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.2f}" if flops >= 1e8 else f"{flops / 1e9:.4f}"


def _traffic(plan: Plan, kind: str) -> str | None:
    found = plan.collectives.get(kind)
    return None if found is None else f"{found.count} x, {found.bytes / GB:,.2f} GB"


def _share(plan: Plan, part: str) -> str | None:
    if not plan.step or not plan.step_seconds:
        return None
    seconds = plan.step.by_part().get(part, 0.0)
    return f"{seconds * 1e3:,.1f} ms {seconds / plan.step_seconds:6.1%}"


def _overhead(plan: Plan, plans: Sequence[Plan]) -> str | None:
    plain = next((other.step_seconds for other in plans if other.residual == "residual"), None)
    if not plain or not plan.step_seconds or plan.residual == "residual":
        return None
    return f"{plan.step_seconds / plain - 1:+.1%}"
