"""Make pages to look at: one self-contained HTML file, with pictures and sounds in it."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TYPES = {  # by a file's first bytes: what is shown is what it is, not what it is called
    b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"fLaC": "audio/flac", b"OggS": "audio/ogg", b"ID3": "audio/mpeg",
    **dict.fromkeys((b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2"), "audio/mpeg"),
}  # fmt: skip
RIFF_TYPES = {b"WEBP": "image/webp", b"WAVE": "audio/wav"}
STYLE = """
:root{color-scheme:light dark;--line:#8884;--hit:#1a9850}
body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse}td,th{padding:.2rem .7rem;border-bottom:1px solid var(--line);text-align:right}
td:first-child,th:first-child{text-align:left}
.row{display:grid;grid-template-columns:12rem repeat(auto-fill,minmax(6.2rem,1fr));gap:.4rem;padding:.5rem 0;
border-bottom:1px solid var(--line)}
.query{font-weight:600;align-self:center}.item{font-size:.78rem;text-align:center;overflow-wrap:anywhere;
border:2px solid transparent;border-radius:.4rem;padding:.2rem}
.hit{border-color:var(--hit)}.hit::after{content:"✓";color:var(--hit);font-weight:700}
img.media{width:56px;height:56px;image-rendering:auto;background:#fff}audio{width:100%;height:2rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.8rem}
.card{border:1px solid var(--line);border-radius:.5rem;padding:.6rem;overflow-wrap:anywhere}
.card img.media{width:100%;height:11rem;object-fit:contain;background:none}.card small{color:#888}.card p{margin:.3rem 0}
.curves svg{max-width:100%;height:auto;background:#fff}
.wide{overflow-x:auto;margin:.8rem 0}caption{text-align:left;padding:.3rem 0;font-weight:600}
.heat td,.heat th{text-align:center;padding:.3rem .6rem}.heat th{font-weight:500}.heat th:first-child{text-align:right}
.heat small{opacity:.75;display:block}.side{display:flex;flex-wrap:wrap;column-gap:2.5rem}
summary{cursor:pointer;margin:.6rem 0;font-weight:600}
"""


def page(title: str, sections: Iterable[str]) -> str:
    """Return the document. `sections` are HTML, the title is not."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{''.join(sections)}</html>"
    )


def media_type(data: bytes) -> str | None:
    """Return the media type of a picture or a sound, by its first bytes; None for anything else."""
    kind = RIFF_TYPES.get(data[8:12]) if data[:4] == b"RIFF" else None
    return kind or next((kind for start, kind in TYPES.items() if data.startswith(start)), None)


def media(data: bytes, caption: str = "") -> str:
    """Return a member as HTML: a picture or a sound with its bytes embedded, anything else as text."""
    kind = media_type(data)
    if kind is None:
        return html.escape(data[:1200].decode("utf-8", "replace")[:300])
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    if kind.startswith("image"):
        return f'<img class="media" src="{source}" alt="{html.escape(caption)}"><br>{html.escape(caption)}'
    return f'<audio controls preload="none" src="{source}"></audio>{html.escape(caption)}'


def heat_map(
    caption: str,
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Mapping[tuple[int, int], float],
    notes: Mapping[tuple[int, int], str],
) -> str:
    """Return a table whose cells are coloured by their value, as HTML.

    Args:
        shares: 0 to 1, by (row, column); a cell without one is empty.
        notes: what stands in small print below a value.
    """
    lines = []
    for row, name in enumerate(rows):
        cells = [f'<th scope="row">{html.escape(name)}</th>']
        for column in range(len(columns)):
            share = shares.get((row, column))
            if share is None:
                cells.append("<td></td>")
                continue
            note = f"<small>{html.escape(notes[row, column])}</small>" if (row, column) in notes else ""
            cells.append(f'<td style="background:rgba(40,120,200,{0.65 * share:.3f})">{share:.3f}{note}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    return (
        f'<div class="wide"><table class="heat"><caption>{html.escape(caption)}</caption>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def folded(title: str, content: str) -> str:
    """Return a part of a page that a click opens, as HTML."""
    return f'<details><summary>{html.escape(title)}</summary><div class="wide">{content}</div></details>'


def svg(figure: Any) -> str:
    """Return a matplotlib figure as HTML."""
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = target.getvalue()
    return f'<div class="curves">{text[text.index("<svg") :]}</div>'
