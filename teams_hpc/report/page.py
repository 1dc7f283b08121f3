"""Pieces of HTML: escaped text, tables, cards, sections. No other module writes tags."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources


class Html(str):
    """Text that is HTML already; everything else is escaped."""


def text(value: object) -> Html:
    """A value as HTML: escaped unless it is HTML."""
    return value if isinstance(value, Html) else Html(escape("" if value is None else str(value)))


def join(parts: Iterable[object]) -> Html:
    return Html("\n".join(text(part) for part in parts))


def tag(name: str, content: object, css: str = "") -> Html:
    """`<name class=css>content</name>`."""
    attribute = f' class="{escape(css)}"' if css else ""
    return Html(f"<{name}{attribute}>{text(content)}</{name}>")


def table(headings: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table; numbers stand right."""
    head = join(tag("th", heading) for heading in headings)
    body = join(tag("tr", join(_cell(value) for value in row)) for row in rows)
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return tag("div", tag("table", Html(content)), "scroll")


def _cell(value: object) -> Html:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return tag("td", value)
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return tag("td", shown, "number")


def card(label: str, value: object, note: object = "") -> Html:
    """One headline number."""
    return tag("div", join([tag("b", value), tag("span", label), tag("small", note)]), "card")


def figure(svg: str, caption: str) -> Html:
    """A plot with its caption."""
    return tag("figure", join([Html(svg), tag("figcaption", caption)]))


def section(title: str, *parts: object) -> Html:
    """A section; empty ones disappear."""
    content = [part for part in parts if part]
    return tag("section", join([tag("h2", title), *content])) if content else Html("")


def document(title: str, body: object) -> str:
    """The whole self-contained page: no script, no reference to another file."""
    style = (resources.files("teams_hpc.report") / "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{text(body)}\n</main>\n</body>\n</html>\n"
    )
