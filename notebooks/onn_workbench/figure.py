"""A figure is described once and drawn twice: live by plotly, as a picture by matplotlib."""

import base64
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator

WIDTH = 8.3  # inches, at 100 pixels each: of a notebook's cell in a window of 1280 pixels
WHOLE_TICKS = 10  # whole numbers on an axis up to which each has a tick
# colours of Okabe and Ito, told apart by the colour-blind; dashes and markers of both libraries
LOOKS = (
    ("#0072B2", "solid", "-", "circle", "o"),
    ("#D55E00", "dash", "--", "square", "s"),
    ("#009E73", "dot", ":", "triangle-up", "^"),
    ("#CC79A7", "dashdot", "-.", "diamond", "D"),
    ("#E69F00", "longdash", (0, (7, 2)), "triangle-down", "v"),
    ("#56B4E9", "longdashdot", (0, (7, 2, 1, 2)), "cross", "P"),
)


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve; its number chooses colour, dash and marker of LOOKS."""

    label: str  # in the legend, once in a figure; empty: not there
    x: Sequence[float]
    y: Sequence[float]
    number: int = 0
    band: tuple[Sequence[float], Sequence[float]] | None = None  # lowest and highest y
    mode: str = "lines+markers"  # "lines", "markers", or "ticks": upright strokes
    width: float = 2
    colour: str = ""  # instead of the number's


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the colours of lines mean, shown as a colour bar: dark is low, light is high."""

    title: str
    low: float
    high: float

    def colour(self, value: float) -> str:
        """The colour of a value, as "#rrggbb"."""
        return to_hex(colormaps["viridis"](Normalize(self.low, self.high)(value)))


@dataclasses.dataclass(frozen=True)
class Bars:
    """Bars from `start` to `stop`, which lie in rows of the panel."""

    label: str
    rows: Sequence[float]  # of the middle of a bar; 0 is the uppermost
    start: Sequence[float]
    stop: Sequence[float]
    number: int = 0
    height: float = 0.8


@dataclasses.dataclass(frozen=True)
class Panel:
    """Axes with what is drawn in them."""

    parts: Sequence[Line | Bars]
    x: str  # titles of the axes
    y: str = ""
    title: str = ""
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False  # the y axis
    rows: Sequence[str] = ()  # names of the rows of bars, from the top
    levels: dict[str, float] = dataclasses.field(default_factory=dict)  # horizontal lines
    height: float = 3.6  # inches
    scale: Scale | None = None


class Drawn:
    """What a notebook shows live and as a picture.

    A subclass has `plotly()`, the figure as plotly's JSON, `png()`, the figure as a PNG, and
    `text` for readers who see neither.
    """

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        picture = base64.b64encode(self.png()).decode()
        bundle = {"application/vnd.plotly.v1+json": self.plotly(), "image/png": picture}
        return bundle | {"text/plain": self.text}


class Figure(Drawn):
    """Rows of panels, shown by a notebook."""

    def __init__(self, rows: Sequence[Sequence[Panel]], text: str):
        self.rows, self.text = rows, text
        self.heights = [max(panel.height for panel in row) for row in rows]

    def plotly(self) -> dict[str, Any]:
        height = round(100 * (sum(self.heights) + 0.6))
        legend = {"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"}
        layout = {"height": height, "legend": legend, "annotations": [], "shapes": []}
        layout |= {"margin": {"t": 50, "b": 50, "r": 40}, "hovermode": "closest"}
        layout["modebar"] = {"orientation": "v"}  # beside the legend, not over it
        traces, labels, n_panels, top = [], set(), 0, 1.0
        for row, height in zip(self.rows, self.heights, strict=True):
            bottom = max(0.0, top - height / sum(self.heights))
            for column, panel in enumerate(row):
                n_panels += 1
                number = "" if n_panels == 1 else str(n_panels)  # of its axes, as plotly has it
                left = 0.8 / WIDTH if column else 0.0  # room for the y axis's title
                bar = 1.0 / WIDTH if panel.scale else 0.0  # room for the colour bar
                domains = (
                    [column / len(row) + left, (column + 1) / len(row) - bar],
                    [bottom + 0.7 / sum(self.heights) * (bottom > 0), top - 0.02],
                )
                _plotly_panel(panel, number, domains, layout)
                if panel.scale:
                    traces.append(_plotly_scale(panel.scale, number, domains, layout))
                for part in panel.parts:
                    traces += _traces(part, number, part.label and part.label not in labels)
                    labels.add(part.label)
            top = bottom
        return {"data": traces, "layout": layout}

    def png(self) -> bytes:
        drawing = Drawing(figsize=(WIDTH, sum(self.heights) + 0.4), layout="constrained")
        n_columns = math.lcm(*map(len, self.rows))
        grid = drawing.add_gridspec(len(self.rows), n_columns, height_ratios=self.heights)
        handles: dict[str, Any] = {}
        for number, row in enumerate(self.rows):
            span = n_columns // len(row)
            for column, panel in enumerate(row):
                place = grid[number, column * span : (column + 1) * span]
                axes = drawing.add_subplot(place)
                _draw_panel(panel, axes)
                if panel.scale:
                    drawing.colorbar(_mappable(panel.scale), ax=axes, label=panel.scale.title)
                for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                    handles.setdefault(label, handle)
        widest = max(map(len, handles), default=0)
        n_columns = max(1, min(len(handles), int(WIDTH * 11 / (widest + 8))))
        drawing.legend(
            handles.values(),
            handles.keys(),
            loc="outside upper center",
            ncols=n_columns,
            frameon=False,
            handlelength=3,
        )
        return _png_of(drawing)


class Parallel(Drawn):
    """Parallel coordinates: a line a run, an upright axis a setting, the last axis its colour.

    axes: title -> values, one a run; those of the last are numbers, and low is good. A setting's
    values stand at even distances, in order.
    """

    def __init__(self, axes: dict[str, Sequence[Any]], text: str):
        *settings, (self.title, values) = axes.items()
        self.values = [float(value) for value in values]
        self.settings = {title: _places(values) for title, values in settings}
        self.text = text
        low, high = min(self.values), max(self.values)
        margin = 0.05 * (high - low) or 0.05
        self.low, self.high = low - margin, high + margin

    def plotly(self) -> dict[str, Any]:
        dimensions = [
            {"label": title, "values": places, "range": [-0.3, len(names) - 0.7]}
            | {"tickvals": list(range(len(names))), "ticktext": names}
            for title, (names, places) in self.settings.items()
        ]
        last = {"label": self.title, "values": self.values, "range": [self.low, self.high]}
        colour = {"color": self.values, "colorscale": "Viridis", "showscale": True}
        colour["colorbar"] = {"title": {"text": self.title, "side": "right"}}
        trace = {"type": "parcoords", "dimensions": [*dimensions, last], "line": colour}
        margin = {"t": 60, "b": 30, "l": 80, "r": 40}
        return {"data": [trace], "layout": {"height": 400, "margin": margin}}

    def png(self) -> bytes:
        drawing = Drawing(figsize=(WIDTH, 4), layout="constrained")
        axes = drawing.add_subplot()
        scale = Scale(self.title, min(self.values), max(self.values))
        columns = [
            [(place + 0.3) / (len(names) - 0.4) for place in places]
            for names, places in self.settings.values()
        ]
        columns.append([(v - self.low) / (self.high - self.low) for v in self.values])
        best = min(self.values)
        for value, heights in zip(self.values, zip(*columns, strict=True), strict=True):
            width = 3.5 if value == best else 1.5
            axes.plot(heights, color=scale.colour(value), linewidth=width)
        ticks = [
            [((place + 0.3) / (len(names) - 0.4), name) for place, name in enumerate(names)]
            for names, _ in self.settings.values()
        ]
        numbers = MaxNLocator(4).tick_values(min(self.values), max(self.values))
        heights = [(number - self.low) / (self.high - self.low) for number in numbers]
        ticks.append([(height, f"{n:g}") for height, n in zip(heights, numbers, strict=True)])
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        for number, own in enumerate(ticks):
            axes.axvline(number, color="black", linewidth=1)
            for height, name in own:
                if 0 <= height <= 1:
                    place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
                    axes.annotate(name, (number, height), fontsize=9, bbox=box, **place)
        axes.set_xticks(range(len(columns)), [*self.settings, self.title])
        axes.set(yticks=[], ylim=(0, 1), xlim=(-0.05, len(columns) - 1 + 0.05))
        axes.spines[:].set_visible(False)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        drawing.colorbar(_mappable(scale), ax=axes, label=f"{self.title}; thick: the lowest")
        return _png_of(drawing)


def _places(values: Sequence[Any]) -> tuple[list[str], list[int]]:
    """The distinct values in order, as text, and the place of each value among them."""
    numbers = all(isinstance(value, int | float) for value in values)
    distinct = sorted(set(values), key=float if numbers else str)
    names = [f"{value:g}" if numbers else str(value) for value in distinct]
    return names, [distinct.index(value) for value in values]


def _png_of(drawing: Drawing) -> bytes:
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _mappable(scale: Scale) -> ScalarMappable:
    return ScalarMappable(Normalize(scale.low, scale.high), "viridis")


def _plotly_scale(
    scale: Scale, number: str, domains: tuple, layout: dict[str, Any]
) -> dict[str, Any]:
    """Add a colour bar beside a panel to the layout; the trace that makes plotly show it."""
    bar = {"title": {"text": scale.title, "side": "right"}, "thickness": 12, "lenmode": "fraction"}
    bar |= {"x": domains[0][1], "xanchor": "left", "y": sum(domains[1]) / 2, "yanchor": "middle"}
    bar["len"] = domains[1][1] - domains[1][0]
    name = f"coloraxis{number}"
    limits = {"cmin": scale.low, "cmax": scale.high}
    layout[name] = limits | {"colorscale": "Viridis", "colorbar": bar}
    trace = {"type": "scatter", "x": [None], "y": [None], "mode": "markers", "showlegend": False}
    trace |= {"xaxis": f"x{number}", "yaxis": f"y{number}", "hoverinfo": "skip"}
    return trace | {"marker": {"color": [scale.low], "coloraxis": name}}


def _plotly_panel(panel: Panel, number: str, domains: tuple, layout: dict[str, Any]) -> None:
    """Add the axes of `panel`, its title and its levels to a plotly layout."""
    x = {"title": {"text": panel.x, "standoff": 8}, "domain": domains[0], "anchor": f"y{number}"}
    y = {"title": {"text": panel.y}, "domain": domains[1], "anchor": f"x{number}"}
    y["automargin"] = x["showline"] = y["showline"] = True
    x["zeroline"] = y["zeroline"] = False
    for axis, is_log in ((x, panel.log_x), (y, panel.log_y)):
        axis |= {"type": "log", "exponentformat": "power"} if is_log else {"type": "linear"}
    if ticks := _log_ticks(panel, "y"):
        y |= {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    if ticks := _log_ticks(panel, "x"):
        x |= {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    elif alone := _only_count(panel):
        x |= {"range": [alone - 1, alone + 1], "tickvals": [alone]}
    elif _is_whole(panel) and max(_xs(panel)) - min(_xs(panel)) <= WHOLE_TICKS:
        x["dtick"] = 1
    if panel.from_zero:
        y["rangemode"] = "tozero"
    if panel.rows:
        y |= {"tickvals": list(range(len(panel.rows))), "ticktext": list(panel.rows)}
        y["range"] = [len(panel.rows) - 0.5, -0.5]
    layout |= {f"xaxis{number}": x, f"yaxis{number}": y}
    note = {"showarrow": False, "yanchor": "bottom"}
    if panel.title:
        place = {"xref": "paper", "yref": "paper", "x": sum(domains[0]) / 2, "y": domains[1][1]}
        layout["annotations"].append(note | place | {"text": panel.title})
    for label, value in panel.levels.items():
        line = {"type": "line", "xref": f"x{number} domain", "yref": f"y{number}", "x0": 0, "x1": 1}
        layout["shapes"].append(line | {"y0": value, "y1": value, "line": {"width": 1}})
        place = {"xref": line["xref"], "yref": line["yref"], "x": 0, "xanchor": "left"}
        place["y"] = math.log10(value) if panel.log_y else value
        layout["annotations"].append(note | place | {"text": label})


def _traces(part: Line | Bars, number: str, in_legend: Any) -> list[dict[str, Any]]:
    colour, dash, _, symbol, _ = LOOKS[part.number % len(LOOKS)]
    trace = {"name": part.label, "xaxis": f"x{number}", "yaxis": f"y{number}"}
    trace |= {"legendgroup": part.label, "showlegend": bool(in_legend)}
    if isinstance(part, Bars):
        lengths = [stop - start for start, stop in zip(part.start, part.stop, strict=True)]
        trace |= {"type": "bar", "orientation": "h", "marker": {"color": colour}}
        trace |= {"x": lengths, "y": list(part.rows), "width": part.height}
        trace |= {"offset": -part.height / 2} | (
            {"base": list(part.start)} if any(part.start) else {}
        )
        return [trace]
    colour = part.colour or colour
    trace |= {"type": "scatter", "x": list(part.x), "y": list(part.y), "mode": part.mode}
    trace |= {"line": {"color": colour, "dash": dash, "width": part.width}}
    trace["marker"] = {"color": colour, "symbol": symbol, "size": 3 + 2 * part.width}
    if part.mode == "ticks":
        strokes = {"symbol": "line-ns-open", "size": 16, "line": {"width": part.width}}
        trace |= {"mode": "markers", "marker": trace["marker"] | strokes}
    if part.band is None:
        return [trace]
    low, high = map(list, part.band)
    band = trace | {"x": trace["x"] + trace["x"][::-1], "y": high + low[::-1], "mode": "none"}
    band |= {"fill": "toself", "fillcolor": colour, "opacity": 0.2, "hoverinfo": "skip"}
    return [band | {"showlegend": False}, trace]


def _xs(panel: Panel) -> list[float]:
    return [x for part in panel.parts if isinstance(part, Line) for x in part.x]


def _is_whole(panel: Panel) -> bool:
    """Whether all x are whole numbers, so that half of one means nothing."""
    return not panel.rows and bool(_xs(panel)) and all(float(x).is_integer() for x in _xs(panel))


def _only_count(panel: Panel) -> int:
    """The one x of a panel whose points all have it, if it is a whole number; else 0."""
    found = {float(x) for x in _xs(panel)}
    alone = found.pop() if len(found) == 1 and not panel.log_x and not panel.rows else 0.5
    return int(alone) if alone.is_integer() else 0


def _log_ticks(panel: Panel, axis: str) -> list[float]:
    """The ticks of a logarithmic axis: 1, 2, 5, 10 ... between its points, so no half of a step.

    Empty for an axis that is none, and for a y axis of many decades, which has powers.
    """
    lines = [part for part in panel.parts if isinstance(part, Line)]
    points = [value for line in lines for value in getattr(line, axis) if value > 0]
    points += panel.levels.values() if axis == "y" else ()
    if not getattr(panel, f"log_{axis}") or not points:
        return []
    low, high = min(points), max(points)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if axis == "y" and len(decades) > 5:
        return []
    factors = (1, 2, 5) if len(decades) < 4 else (1, 3) if len(decades) < 6 else (1,)
    factors = range(1, 10) if high < 5 * low else factors
    ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
    return [tick for tick in ticks if low <= tick <= high] or [low]


def _draw_panel(panel: Panel, axes: Any) -> None:
    for part in panel.parts:
        colour, _, dash, _, marker = LOOKS[part.number % len(LOOKS)]
        label = part.label or None
        if isinstance(part, Bars):
            lengths = [stop - start for start, stop in zip(part.start, part.stop, strict=True)]
            axes.barh(part.rows, lengths, part.height, part.start, color=colour, label=label)
            continue
        colour = part.colour or colour
        style = {"linestyle": dash if "lines" in part.mode else "", "color": colour}
        style |= {"linewidth": part.width, "label": label}
        if "markers" in part.mode:
            style |= {"marker": marker, "markersize": 2.5 + 1.2 * part.width}
        if part.mode == "ticks":
            style |= {"marker": "|", "markersize": 16, "markeredgewidth": part.width}
        axes.plot(part.x, part.y, **style)
        if part.band is not None:
            axes.fill_between(part.x, *part.band, color=colour, alpha=0.15, linewidth=0)
    for label, value in panel.levels.items():
        axes.axhline(value, color="black", linewidth=1)
        place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(label, (0.01, value), (0, 3), fontsize=9, **place)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    axes.set_title(panel.title, fontsize=10)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    if ticks := _log_ticks(panel, "y"):
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.minorticks_off()
    if panel.from_zero:
        axes.set_ylim(0, 1.08 * axes.dataLim.y1)
    if panel.rows:
        axes.set_yticks(range(len(panel.rows)), panel.rows, fontsize=8)
        axes.set_ylim(len(panel.rows) - 0.5, -0.5)
    if ticks := _log_ticks(panel, "x"):
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.minorticks_off()
        if len(ticks) == 1:
            axes.set_xlim(ticks[0] / 2, 2 * ticks[0])
    elif alone := _only_count(panel):
        axes.set(xlim=(alone - 1, alone + 1), xticks=[alone])
    elif _is_whole(panel):
        axes.locator_params("x", integer=True)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
