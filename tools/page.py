"""An HTML page that needs nothing else and runs nothing: words, tables and pictures in one file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from train_lora import IMAGE_FORMATS

SIDES = (384, 256, 192, 128, 96)  # of thumbnails, until the page is small enough
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root{color-scheme:light dark;--line:#8884;--strong:#2457a6;--pale:#b9cdea;--text:#667}
@media(prefers-color-scheme:dark){:root{--strong:#8ab4f8;--pale:#35507a;--text:#99a}}
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.25rem;margin-top:2.2rem}h3{font-size:1rem;margin-top:1.5rem}
table{border-collapse:collapse}
td,th{padding:.2rem .8rem .2rem 0;border-bottom:1px solid var(--line);text-align:left}
td,th{vertical-align:top;overflow-wrap:anywhere}.wide{overflow-x:auto}.wide th{min-width:6rem}
.wide td{overflow-wrap:normal;min-width:5.5rem}.told{color:var(--text)}
.sheet{display:flex;flex-wrap:wrap;gap:.8rem}figure{margin:0;width:8rem}
figcaption{font-size:12px;line-height:1.3;color:var(--text);overflow-wrap:anywhere}
img{display:block;max-width:12rem}svg{width:100%;height:auto}
svg text{font-size:11px;fill:var(--text)}
polyline{fill:none}.raw{stroke:var(--pale);stroke-width:1}.mean{stroke:var(--strong);stroke-width:2.5}
.held{stroke:#c8641e;stroke-width:2.5;stroke-dasharray:3 4}
.checkpoint{stroke:var(--line)}.seam{stroke:#c60;stroke-dasharray:4 3}
.steep{display:none}.steep:target{display:block}.steep:target+.flat{display:none}
@media print{body{margin:0;max-width:none}details>*{display:block}}
"""

Key = TypeVar("Key", bound=Hashable)


def esc(value: object) -> str:
    """Show a text as it is, whatever it holds, in ASCII."""
    text = html.escape(str(value), quote=True)
    return text.encode("ascii", "xmlcharrefreplace").decode()


def rows(pairs: Iterable[Sequence[object]]) -> str:
    """Lay out rows of a table."""
    cells = ("".join(f"<td>{esc(cell)}</td>" for cell in row) for row in pairs)
    return "".join(f"<tr>{row}</tr>" for row in cells)


def table(head: Sequence[object], body: Iterable[Sequence[object]]) -> str:
    """Lay out a table, which may be wider than the page."""
    names = "".join(f"<th>{esc(name)}</th>" for name in head)
    return f'<div class="wide"><table><tr>{names}</tr>{rows(body)}</table></div>'


def bullets(texts: Iterable[str]) -> str:
    """Lay out a list."""
    return f"<ul>{''.join(f'<li>{esc(text)}</li>' for text in texts)}</ul>"


def thumbnail(path: Path, side: int) -> str | None:
    """Make a small picture that stands in the page itself; None for what is no picture."""
    from PIL import Image

    try:
        with Image.open(path, formats=IMAGE_FORMATS) as opened:
            opened.thumbnail((side, side))
            buffer = io.BytesIO()
            opened.convert("RGB").save(buffer, "WEBP", quality=80)
    except Exception:  # noqa: BLE001, hostile bytes make decoders raise anything
        return None
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnails(
    files: Mapping[Key, Path], most_bytes: int, at: Callable[[int], None], largest: int = SIDES[0]
) -> dict[Key, str | None]:
    """Make small pictures, the smaller the more there are; also the smallest may be too much."""
    made: dict[Key, str | None] = {}
    for side in (each for each in SIDES if each <= largest):
        made = {}
        for done, (key, file) in enumerate(files.items()):
            at(done)
            made[key] = thumbnail(file, side)
        if sum(len(picture or "") for picture in made.values()) <= most_bytes:
            break
    return made


def picture(source: str | None, words: str) -> str:
    """Show a small picture, which words tell too; a dash where there is none."""
    told = esc(words)
    return f'<img src="{source}" alt="{told}" title="{told}">' if source else "&ndash;"


def grid(
    head: Sequence[object], lines: Iterable[tuple[object, Sequence[tuple[str | None, str]]]]
) -> str:
    """Lay pictures out: a line each with its name, and columns with theirs."""
    names = "".join(f"<th>{esc(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th>{esc(name)}</th>{''.join(f'<td>{picture(*cell)}</td>' for cell in cells)}</tr>"
        for name, cells in lines
    )
    return f'<div class="wide"><table><tr><td></td>{names}</tr>{body}</table></div>'


def sheet(cells: Iterable[tuple[str | None, str, str]]) -> str:
    """Lay pictures out one after the other: what is seen, its name, and what is said of it."""
    figures = (
        f"<figure>{picture(source, name)}<figcaption>{esc(words)}</figcaption></figure>"
        for source, name, words in cells
    )
    return f'<div class="sheet">{"".join(figures)}</div>'


def solid(words: str) -> str:
    """Keep words in one line."""
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def document(title: str, parts: Iterable[str]) -> bytes:
    """Put a page together."""
    head = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head><body>"
    )
    return f"{head}{''.join(parts)}</body></html>\n".encode("ascii")
