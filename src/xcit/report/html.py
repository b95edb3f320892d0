"""One self-contained HTML page: text, tables and embedded pictures, no script, nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light; --ink: #1f2430; --grey: #6b7280; --line: #e5e7eb; --blue: #2563eb; --red: #c81e3a; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
header p { color: var(--grey); margin: .25rem 0 0; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.1rem; margin: 0 0 .75rem; }
section { background: white; border: 1px solid var(--line); border-radius: .6rem; padding: 1.25rem; margin-top: 1rem; }
section > :last-child { margin-bottom: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1rem; margin-top: 1.5rem; }
.figures > div { background: white; border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; }
.figures b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.figures small { color: var(--grey); display: block; line-height: 1.4; margin-top: .2rem; }
figure { margin: 0 0 1rem; }
figure div { overflow-x: auto; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figure img.wide { min-width: 34rem; }
figcaption, .note { color: var(--grey); font-size: .9rem; }
figcaption { margin-top: .5rem; }
p { margin: 0 0 .9rem; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--grey); font-weight: 500; }
tr:last-child td { border-bottom: 0; }
pre { background: #f6f7f9; border: 1px solid var(--line); border-radius: .4rem; padding: .75rem 1rem; overflow-x: auto;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 0 0 1rem; }
details summary { cursor: pointer; color: var(--blue); margin-bottom: .75rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: 1rem;
  margin-bottom: 1rem; }
.gallery.pairs { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.gallery figure { margin: 0; }
.gallery figure div { display: flex; gap: .25rem; overflow: hidden; }
.gallery img { flex: 1; min-width: 0; width: 100%; height: auto; margin: 0; border-radius: .3rem; }
.gallery figcaption { font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere; color: var(--ink); }
.gallery figcaption.wrong { color: var(--red); }
"""

WIDE = 640
"""Pictures of more pixels are not squeezed into a phone's screen, but can be pushed sideways there."""


@dataclass(frozen=True)
class KeyFigure:
    """A number that stands large at the top, with what it is below."""

    value: str
    label: str


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG with its caption; ``alt`` says to those who cannot see it what it shows; ``width`` in pixels."""

    data: bytes
    alt: str
    caption: str = ""
    width: int | None = None


@dataclass(frozen=True)
class Thumbnail:
    """Small pictures side by side, PNG or JPEG, and a caption below them; that of a mistake is red."""

    pictures: Sequence[bytes]
    alt: str
    caption: str
    wrong: bool = False


@dataclass(frozen=True)
class Gallery:
    """Thumbnails, as many in a line as there is room for."""

    thumbnails: Sequence[Thumbnail]


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; an empty header is left out. With a ``summary`` it is folded away behind that."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    summary: str = ""


@dataclass(frozen=True)
class Code:
    """Text to copy, as it stands; with a ``summary`` it is folded away behind that."""

    text: str
    summary: str = ""


Block = Prose | Picture | Gallery | Table | Code


@dataclass(frozen=True)
class Section:
    """A titled card of blocks."""

    title: str
    blocks: Sequence[Block]


def html_page(title: str, subtitle: str, figures: Sequence[KeyFigure], sections: Sequence[Section]) -> str:
    """Return the page. All text is escaped; pictures are embedded."""
    cards = "".join(
        f"<div><b>{escape(figure.value)}</b><small>{escape(figure.label)}</small></div>" for figure in figures
    )
    body = "".join(
        f"<section><h2>{escape(section.title)}</h2>{''.join(map(_block, section.blocks))}</section>\n"
        for section in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
<div class="figures">{cards}</div>
{body}</main>
</body>
</html>
"""


def _block(block: Block) -> str:
    match block:
        case Prose(text):
            return f"<p>{escape(text)}</p>"
        case Picture(data, alt, caption, width):
            size = f' width="{width}"' if width else ""
            words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
            wide = ' class="wide"' if width and width > WIDE else ""
            image = f'<img src="{_data_uri(data)}" alt="{escape(alt)}"{size}{wide}>'
            return f"<figure><div>{image}</div>{words}</figure>"
        case Gallery(thumbnails):
            pairs = " pairs" if any(len(thumbnail.pictures) > 1 for thumbnail in thumbnails) else ""
            return f'<div class="gallery{pairs}">{"".join(map(_thumbnail, thumbnails))}</div>'
        case Table(header, rows, summary):
            head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
            lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
            table = f'<div class="scroll"><table>{f"<tr>{head}</tr>" if head else ""}{lines}</table></div>'
            return _folded(table, summary)
        case Code(text, summary):
            return _folded(f"<pre>{escape(text)}</pre>", summary)


def _thumbnail(thumbnail: Thumbnail) -> str:
    first, *others = map(_data_uri, thumbnail.pictures)
    images = f'<img src="{first}" alt="{escape(thumbnail.alt)}">' + "".join(
        f'<img src="{other}" alt="">' for other in others
    )
    wrong = ' class="wrong"' if thumbnail.wrong else ""
    return f"<figure><div>{images}</div><figcaption{wrong}>{escape(thumbnail.caption)}</figcaption></figure>"


def _data_uri(data: bytes) -> str:
    kind = "jpeg" if data.startswith(b"\xff\xd8\xff") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _folded(content: str, summary: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if summary else content
