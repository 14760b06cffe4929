"""The frame of a report: one HTML page that needs nothing else, for a wide and a narrow screen, light and dark."""

from __future__ import annotations

from html import escape

from bascule.bench.charts import FAINT, GROUND, INK, MUTED, ORANGE

_DARK = {INK: "#dfe6ec", FAINT: "#33404c", MUTED: "#93a3b1", GROUND: "#12181e"}
_STYLE = f"""
:root {{ color-scheme: light dark; --ink: {INK}; --faint: {FAINT}; --muted: {MUTED}; --ground: {GROUND};
  --accent: {ORANGE}; --faint-fill: #f3f6f8; }}
body {{ font-family: system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 980px;
  margin: 24px auto; padding: 0 16px; }}
h1 {{ font-size: 22px; margin-bottom: 2px; }} h2 {{ font-size: 16px; margin: 28px 0 6px; }}
p, li {{ line-height: 1.45; }} ul {{ padding-left: 20px; }}
p.under {{ color: var(--muted); margin-top: 0; }}
table {{ border-collapse: collapse; font-size: 13px; margin: 6px 0; }}
td, th {{ padding: 3px 14px 3px 0; text-align: right; border-bottom: 1px solid var(--faint); vertical-align: top; }}
td:first-child, th:first-child {{ text-align: left; }}
.wide {{ overflow-x: auto; }}
.doubt {{ border-left: 3px solid var(--accent); padding-left: 10px; }}
.row {{ display: flex; flex-wrap: wrap; align-items: flex-start; gap: 12px; }}
svg {{ font-family: inherit; max-width: 100%; height: auto; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: {_DARK[INK]}; --faint: {_DARK[FAINT]}; --muted: {_DARK[MUTED]}; --ground: {_DARK[GROUND]};
    --faint-fill: #1c252d; }}
"""


def page(title: str, body: str, style: str = "") -> str:
    """`body` in the frame; `style` is CSS of its own, which may use the frame's variables."""
    dark = "".join(
        f'  svg [{what}="{light}"] {{ {what}: {shade}; }}\n'
        for light, shade in _DARK.items()
        for what in ("fill", "stroke")
    )
    # What a picture does not colour itself has the colour of the whole of it.
    dark += f'  svg[fill="{INK}"] {{ fill: {_DARK[INK]}; }}\n}}\n'
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{dark}{style}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'
