"""A document as a list of blocks, and its two renderings: Markdown beside its figures, and one self-contained HTML file.

What the blocks say is decided by report. In text, `code` between backticks is the only markup.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --ink: #1d2125; --paper: #ffffff; --soft: #f3f4f6; --line: #d5d9de; --warn: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --paper: #15181b; --soft: #20252a; --line: #3a4148; --warn: #3a2f17; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.2rem; } h3 { font-size: 1.05rem; margin-top: 1.6rem; }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .87em; background: var(--soft); border-radius: 4px; }
code { padding: .1em .3em; } pre { padding: .8rem; overflow-x: auto; } pre code { padding: 0; background: none; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; } table.text td:not(:first-child) { white-space: normal; overflow-wrap: normal; }
table.text th, table.text td { text-align: left; vertical-align: top; }
thead th { border-bottom-width: 2px; font-weight: 600; }
figure { margin: 1rem 0; } figure img { width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
figcaption { font-size: .92rem; } .note { background: var(--warn); padding: .6rem .9rem; border-radius: 6px; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the document's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text; a note is set apart."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Items:
    """A bulleted list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table; columns after the first are numbers, unless `words`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG with its title and how to read it."""

    path: str  # relative to the Markdown file
    title: str
    reading: str
    png: bytes


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    text: str


Block = Heading | Paragraph | Items | Table | Picture | Code


def to_markdown(blocks: Sequence[Block]) -> str:
    """GitHub-flavoured Markdown; pictures are links relative to the file."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One HTML file that needs nothing else: inline style, embedded pictures, no scripts, readable on a phone and in dark mode."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text, note):
            return f"> {text}" if note else text
        case Items(texts):
            return "\n".join(f"- {text}" for text in texts)
        case Table(header, rows, words):
            rule = ["---", *(["---" if words else "---:"] * (len(header) - 1))]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, rule, *rows))
        case Picture(path, title, reading, _):
            return f"![{title}]({path})\n\n{reading}"
        case Code(text):
            return f"```\n{text.rstrip()}\n```"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Paragraph(text, note):
            return f'<p class="note">{_inline(text)}</p>' if note else f"<p>{_inline(text)}</p>"
        case Items(texts):
            return "<ul>" + "".join(f"<li>{_inline(text)}</li>" for text in texts) + "</ul>"
        case Table(header, rows, words):
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
            body = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            kind = ' class="text"' if words else ""
            return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Picture(_, title, reading, png):
            data = base64.b64encode(png).decode()
            image = f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{_inline(reading)}</figcaption></figure>"
        case Code(text):
            return f"<pre><code>{html.escape(text.rstrip())}</code></pre>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
