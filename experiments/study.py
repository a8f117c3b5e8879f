"""What every study shares: its report and how its figures are drawn.

A study answers a question that a list of runs does not fit, such as one about cost or made data. It keeps what it found in files of its
folder, so that the same command goes on where it was cut, and draws a finished report again.
"""

import io
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from mhc_jax.experiments.document import Block, Heading, Picture, to_html, to_markdown
from mhc_jax.experiments.style import styled
from mhc_jax.files import AnyPath, write_atomically

Say = Callable[[str], None]
# Folder, the command line that asked for it, what is told of a line at a time; and the folder of a run list, where a study reads one.
Study = Callable[..., None]


def write_study(folder: AnyPath, title: str, blocks: Sequence[Block], say: Say) -> None:
    """Writes report.md, report.html and the figures of the blocks."""
    for block in blocks:
        if isinstance(block, Picture):
            write_atomically(folder / block.path, block.png)
    blocks = [Heading(title, level=1), *blocks]
    write_atomically(folder / "report.md", to_markdown(blocks))
    write_atomically(folder / "report.html", to_html(title, blocks))
    say(f"report: {folder / 'report.html'}")


def to_png(draw: Callable[[], Figure], dpi: int | None = None) -> bytes:
    """The figure as PNG, drawn in the shared style; `dpi` in place of the style's, as in a notebook that must stay small."""
    buffer = io.BytesIO()
    with styled():
        draw().savefig(buffer, format="png", dpi=dpi or "figure")
    return buffer.getvalue()
