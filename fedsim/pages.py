"""Pages: one HTML file each, with figures and style inside, that needs no network and no scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TOMLLexer

from fedsim.canvas import WIDTH, svg
from fedsim.checkpoints import replace_file, writing
from fedsim.plots import Drawing

PIXELS_PER_INCH = 96

WIDE = 1.5 * WIDTH
"""Figures of more inches take the whole width of a page."""


class Picture(NamedTuple):
    """A figure inside a page: the address that holds all of it, and its size in pixels."""

    name: str
    caption: str
    source: str
    width: int
    height: int
    wide: bool


class Cell(NamedTuple):
    """A cell of a table, and whether it is the best of its column."""

    text: str
    best: bool = False


class Rows(NamedTuple):
    """A table: names of the columns, and rows that begin with their own name."""

    header: Sequence[str]
    body: Sequence[Sequence[Cell]]


def picture(drawing: Drawing) -> Picture:
    """Put a figure into an address as SVG.

    Parameters
    ----------
    drawing : Drawing
        Figure, name and caption.

    Returns
    -------
    Picture
        For the macro ``figures`` of the templates.
    """
    width, height = drawing.figure.get_size_inches() * PIXELS_PER_INCH
    content = base64.b64encode(svg(drawing.figure).encode()).decode()
    return Picture(
        drawing.name,
        drawing.caption,
        f"data:image/svg+xml;base64,{content}",
        round(width),
        round(height),
        bool(width > WIDE * PIXELS_PER_INCH),
    )


def toml(text: str) -> Markup:
    """Highlight TOML."""
    return Markup(highlight(text, TOMLLexer(), HtmlFormatter(cssclass="code")))


def write(path: Path, template: str, values: Mapping[str, Any]) -> Path:
    """Fill a template and write the page.

    Parameters
    ----------
    path : Path
        File of the page; its directory is made if absent.
    template : str
        Name of a file in ``fedsim/templates``.
    values : mapping
        What the template names.

    Returns
    -------
    Path
        The file.
    """
    environment = Environment(
        loader=PackageLoader("fedsim"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render({
        **values,
        "fedsim_version": version("fedsim"),
        "code_style": Markup(_code_style()),
    })
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    return path


def number(value: float | int | None) -> str:
    """Write a number for people.

    Parameters
    ----------
    value : float, int or None
        Whole numbers are written in full, others with four digits, None and NaN not at all.

    Returns
    -------
    str
        The text.

    Examples
    --------
    >>> number(0.94512), number(1234567), number(2.5e-7), number(None)
    ('0.9451', '1,234,567', '2.5e-07', '')
    """
    if value is None or value != value:
        return ""
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    )


def num_bytes(value: float) -> str:
    """Write a number of bytes for people.

    Parameters
    ----------
    value : float
        Bytes, >= 0.

    Returns
    -------
    str
        With a unit of a power of 1000.

    Examples
    --------
    >>> num_bytes(512), num_bytes(60040000)
    ('512 B', '60.0 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _code_style() -> str:
    """Return the colours of highlighted code, light and dark, without backgrounds."""
    light, dark = (
        HtmlFormatter(style=name, cssclass="code", nobackground=True).get_style_defs(".code")
        for name in ("xcode", "github-dark")
    )
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"
