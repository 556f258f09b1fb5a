"""Tables as a reader wants them: numbers right and with even decimals, sentences left."""

import html
import math
import numbers
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

# "1,234", "-3.1 %", "+0.049 ± 0.022", "0.1 to 0.3", "1e-05"
NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*(?:e[-+]?\d+)?|inf|nan)"
MOST_DECIMALS = 3
NUMERIC = re.compile(rf"{NUMBER}(?: (?:±|to) {NUMBER})?(?: ?%)?")


def frame(rows: Sequence[dict[str, Any]], index: str | list[str]) -> pd.DataFrame:
    """A pandas frame of `rows`, whose counts stay whole when it is transposed."""
    columns = None if rows else [index] if isinstance(index, str) else index
    return pd.DataFrame(rows, columns=columns, dtype=object).set_index(index)


class Table:
    """A frame as a notebook shows it.

    across: a row of the frame becomes a column, for a few rows of many values.
    """

    def __init__(self, frame: pd.DataFrame, across: bool = False):
        self.frame, self.across = frame, across

    def _repr_html_(self) -> str:
        return to_html(self.frame, self.across)

    def __repr__(self) -> str:
        head, *rows = formatted(self.frame, self.across)
        return pd.DataFrame(rows, columns=head).to_string(index=False)


def formatted(frame: pd.DataFrame, across: bool = False) -> list[list[str]]:
    """The head and the rows of a table as text; its index is a column like the others."""
    named = any(name is not None for name in frame.index.names)
    frame = frame.reset_index() if named else frame
    columns = [[str(name), *_texts(list(frame[name]))] for name in frame.columns]
    return columns if across else [list(row) for row in zip(*columns, strict=True)]


def to_html(frame: pd.DataFrame, across: bool = False) -> str:
    """`frame` as an HTML table; every cell says how it is aligned, whatever styles are around."""
    head, *rows = formatted(frame, across)
    columns = list(zip(*rows, strict=True)) or [()] * len(head)
    right = [bool(any(column)) and all(map(_is_number, column)) for column in columns]

    def cell(kind: str, text: str, is_number: bool) -> str:
        align = "right; white-space: nowrap" if is_number else "left"
        style = f"text-align: {align}; vertical-align: top"
        return f'<{kind} style="{style}">{html.escape(text)}</{kind}>'

    top = "".join(cell("th", *pair) for pair in zip(head, right, strict=True))
    lines = []
    for row in rows:
        numeric = [right[n] or (across and n > 0 and _is_number(x)) for n, x in enumerate(row)]
        lines.append("".join(cell("td", *pair) for pair in zip(row, numeric, strict=True)))
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"<table><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def two_digits(value: float) -> str:
    """`value` to two digits, whole from 100 on; what is less than 0.0001 has an exponent."""
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


def cut(text: str, was_cut: bool) -> str:
    """An answer on one line, with an ellipsis where it was cut."""
    return " ".join(text.split()) + ("…" if was_cut else "")


def _is_number(text: str) -> bool:
    return not text or NUMERIC.fullmatch(text) is not None


def _texts(values: list[Any]) -> list[str]:
    """The values of a column: whole numbers with commas, others with the same decimals."""
    known = [value for value in values if not _is_missing(value)]
    plain = all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in known)
    if plain and all(isinstance(value, numbers.Integral) for value in known):
        return ["" if _is_missing(value) else f"{value:,}" for value in values]
    if plain:
        form = _form([abs(float(value)) for value in known])
        return ["" if _is_missing(value) else form.format(float(value)) for value in values]
    said = {True: "yes", False: "no"}
    return [
        "" if _is_missing(v) else said[v] if isinstance(v, bool) else " ".join(str(v).split())
        for v in values
    ]


def _form(sizes: list[float]) -> str:
    """The decimals to which the numbers were rounded, or two digits of the smallest but 0."""
    sizes = [size for size in sizes if 0 < size < math.inf]
    least = min(sizes, default=1.0)
    if least < 1e-3:
        return "{:.3g}"
    decimals = max((len(repr(size).partition(".")[2]) for size in sizes), default=1)
    if decimals > MOST_DECIMALS:
        decimals = max(0, min(MOST_DECIMALS, 1 - math.floor(math.log10(least))))
    return f"{{:,.{decimals}f}}"


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
