"""One static HTML page: escaped text, tables that scroll, pictures in the page itself.

A page loads nothing: its style and its pictures are in the file, and its policy forbids
the browser to fetch anything. Everything that is not `Html` is escaped.
"""

import base64
import html
import string
from collections.abc import Mapping, Sequence

_PAGE = string.Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff; --line: #d6d6d6;
  --soft: #f3f3f3; --gray: #5f5f5f; --mark: 0 114 178; --doubt: #9a4a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616;
  --line: #3d3d3d; --soft: #222222; --gray: #a6a6a6; --mark: 86 180 233;
  --doubt: #f0b060; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 0.75rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
p, ul { margin: 0.5rem 0; }
ul { padding-left: 1.2rem; }
.note, caption { color: var(--gray); font-size: 0.875rem; }
caption { text-align: left; padding: 0.25rem 0; min-width: 16rem; }
.doubt { color: var(--doubt); }
.box { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: 0.875rem; overflow-wrap: normal; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.words { text-align: left; white-space: normal; overflow-wrap: anywhere; }
td.words:first-child { min-width: 7rem; overflow-wrap: normal; }
th { color: var(--gray); font-weight: 600; }
table.matrix td { text-align: center; min-width: 2rem;
  background: rgb(var(--mark) / calc(var(--part, 0) * 0.6)); }
.pictures { display: grid; gap: 0.75rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; background: #ffffff;
  border: 1px solid var(--line); border-radius: 4px; }
.wide img { min-width: 70rem; }
summary { cursor: pointer; padding: 0.25rem 0; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


class Html(str):
    """Text that is HTML already, made by the functions of this file alone."""

    __slots__ = ()


def text(value: object) -> Html:
    """A value as escaped text; `Html` stays as it is.

    >>> text("<b>")
    '&lt;b&gt;'
    """
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def page(title: str, *parts: Html) -> str:
    """The whole page.

    Args:
        title: title of the page.
        *parts: its parts, from top to bottom.
    """
    return _PAGE.substitute(title=text(title), body="\n".join(parts))


def joined(*parts: Html) -> Html:
    """Parts one after another."""
    return Html("\n".join(parts))


def section(title: str, *parts: Html) -> Html:
    """A heading and its parts; nothing if all parts are empty."""
    if not any(parts):
        return Html("")
    return Html(f"<section><h2>{text(title)}</h2>\n{joined(*parts)}</section>")


def folded(title: str, *parts: Html) -> Html:
    """Parts that are shown after a click on their title."""
    inside = joined(*parts)
    return Html(f"<details><summary>{text(title)}</summary>\n{inside}</details>")


def paragraph(words: object, kind: str = "") -> Html:
    """A paragraph; `kind` is "note", "doubt" or nothing."""
    return Html(f"<p{_class(kind)}>{text(words)}</p>")


def points(sentences: Sequence[object], kind: str = "") -> Html:
    """A list of sentences; nothing if there are none."""
    if not sentences:
        return Html("")
    items = "".join(f"<li>{text(one)}</li>" for one in sentences)
    return Html(f"<ul{_class(kind)}>{items}</ul>")


def table(
    head: Sequence[object], rows: Sequence[Sequence[object]], note: str = ""
) -> Html:
    """A table that scrolls in a box of its own.

    Args:
        head: names of the columns; none for a table of names and values.
        rows: cells of each row.
        note: line above the table.
    """
    caption = f"<caption>{text(note)}</caption>" if note else ""
    first = "".join(f'<th scope="col">{text(one)}</th>' for one in head)
    first = f"<thead><tr>{first}</tr></thead>" if head else ""
    cell = "<td>" if head else '<td class="words">'
    body = "".join(
        f"<tr>{''.join(f'{cell}{text(one)}</td>' for one in row)}</tr>" for row in rows
    )
    inside = f"{caption}{first}<tbody>{body}</tbody>"
    return Html(f'<div class="box"><table>{inside}</table></div>')


def values(named: Mapping[str, object]) -> Html:
    """A table of names and values."""
    return table((), [*named.items()])


def matrix(names: Sequence[str], counts: Sequence[Sequence[int]], note: str) -> Html:
    """A matrix of counts; the color of a cell is its part of its row.

    Args:
        names: names of the rows, which are those of the columns.
        counts: rows of counts.
        note: line above the matrix.
    """
    rows = []
    for name, row in zip(names, counts, strict=True):
        whole = max(sum(row), 1)
        cells = "".join(
            f'<td style="--part: {n / whole:.3f}">{n or ""}</td>' for n in row
        )
        rows.append(f'<tr><th scope="row">{text(name)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
    inside = (
        f"<caption>{text(note)}</caption><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody>"
    )
    return Html(f'<div class="box"><table class="matrix">{inside}</table></div>')


def image(data: bytes, kind: str, words: str) -> Html:
    """A picture in the page itself.

    Args:
        data: contents of the file.
        kind: "png" or "svg+xml".
        words: the picture in words, for those who cannot see it.
    """
    inside = base64.b64encode(data).decode("ascii")
    source = f"data:image/{kind};base64,{inside}"
    return Html(f'<figure><img src="{source}" alt="{text(words)}"></figure>')


def pictures(*images: Html) -> Html:
    """Pictures side by side, or one below the other on a narrow screen."""
    inside = "".join(images)
    return Html(f'<div class="pictures">{inside}</div>' if inside else "")


def wide(picture: Html) -> Html:
    """A picture that is as wide as the page, and on a narrow screen scrolls in a box.

    Args:
        picture: an `image` whose texts are small; nothing if empty.
    """
    return Html(f'<div class="box wide">{picture}</div>' if picture else "")


def _class(kind: str) -> str:
    return f' class="{text(kind)}"' if kind else ""
