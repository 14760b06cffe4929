"""A report's blocks, and how they look as a page that needs nothing else, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from msgspec import Struct

from bascule.bench.page import page


class Heading(Struct, frozen=True):
    text: str
    level: int = 2


class Words(Struct, frozen=True):
    """A paragraph; `kind` is `verdict`, `doubt`, `under` or nothing."""

    text: str
    kind: str = ""


class Points(Struct, frozen=True):
    """A list."""

    texts: tuple[str, ...]


class Shown(Struct, frozen=True):
    """A table's cell with a mark: `win` or `open`, and the colour of who it is about."""

    text: str
    mark: str = ""
    colour: str = ""
    below: str = ""
    """What is said of it, smaller."""


class Rows(Struct, frozen=True):
    """A table; its first column names the rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[str | Shown, ...], ...]


class Charts(Struct, frozen=True):
    """Pictures (SVG), of which Markdown has nothing but the tables' figures."""

    svgs: tuple[str, ...]


class Code(Struct, frozen=True):
    """Lines to be copied."""

    lines: tuple[str, ...]


Block = Heading | Words | Points | Rows | Charts | Code

_STYLE = """
.verdict { font-size: 18px; line-height: 1.45; font-weight: 600; border-left: 4px solid var(--accent);
  padding: 8px 14px; background: var(--faint-fill); border-radius: 0 6px 6px 0; }
td[class], td:first-child, th { white-space: nowrap; padding-right: 10px; }
h3 { font-size: 14px; margin: 18px 0 4px; } body { max-width: 1000px; }
.win { font-weight: 600; } .open, .below { color: var(--muted); } .below { font-size: 12px; font-weight: 400; }
.open .below { white-space: normal; }
.chip { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 6px; }
pre { font-size: 12px; overflow-x: auto; background: var(--faint-fill); padding: 10px 12px; border-radius: 6px; }
"""


def html(title: str, blocks: Sequence[Block]) -> str:
    """One page."""
    return page(title, "".join(map(_as_html, blocks)), _STYLE)


def markdown(blocks: Sequence[Block]) -> str:
    """The same words and tables."""
    parts = ("\n".join(_as_markdown(block)) for block in blocks)
    return "\n\n".join(part for part in parts if part) + "\n"


def _as_html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Words(text, kind):
            return f'<p class="{kind}">{escape(text)}</p>'
        case Points(texts):
            return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"
        case Rows(head, rows):
            first = "".join(f"<th>{escape(name)}</th>" for name in head)
            body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
            return f'<div class="wide"><table><tr>{first}</tr>{body}</table></div>'
        case Charts(svgs):
            return f'<div class="row">{"".join(svgs)}</div>'
        case Code(lines):
            return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _cell(cell: str | Shown) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    chip = f'<span class="chip" style="background:{cell.colour}"></span>' if cell.colour else ""
    below = f'<div class="below">{escape(cell.below)}</div>' if cell.below else ""
    return f'<td class="{cell.mark}">{chip}{escape(cell.text)}{below}</td>'


def _as_markdown(block: Block) -> Iterator[str]:
    match block:
        case Heading(text, level):
            yield f"{'#' * level} {text}"
        case Words(text, kind):
            yield f"**{text}**" if kind == "verdict" else text
        case Points(texts):
            yield from (f"- {text}" for text in texts)
        case Rows(head, rows):
            yield _row(head)
            yield "|" + "---|" * len(head)
            yield from (_row([cell if isinstance(cell, str) else _marked(cell) for cell in row]) for row in rows)
        case Code(lines):
            yield from (f"    {line}" for line in lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _marked(cell: Shown) -> str:
    words = f"{cell.text} {cell.below}".strip()
    return f"**{words}**" if cell.mark == "win" else words
