"""A figure says the same to both of its readers: plotly's own checks, and a picture's pixels."""

import io
import json
from pathlib import Path

import pytest
from plotly.graph_objects import Figure as Plotly

from onn_core.weights import geometry
from onn_workbench import speed
from onn_workbench.figure import Bars, Figure, Line, Panel, Parallel, Scale

FULL = Path(__file__).parents[1] / "results/full/training_benchmark.json"


@pytest.fixture(scope="module")
def drawn():
    line = Line("loss", [1, 10], [3.0, 2.0], band=([2.5, 1.5], [3.5, 2.5]))
    limit = Line("limit", [5], [0], mode="ticks", colour="black")
    top = [Panel([line], "steps", "loss", log_x=True, levels={"start": 3.0}), Panel([line], "s")]
    rows = Panel([Bars("read", [0, 1], [0, 2], [1, 5], 2), limit], "s", rows=["a", "b"])
    return Figure([top, [rows]], "loss and reads")


def test_plotly_knows_every_part(drawn):
    figure = Plotly(drawn.plotly())  # ValueError for a property that plotly does not have
    band, line, _, again, bars, limit = figure.data
    assert [trace.showlegend for trace in figure.data] == [False, True, False, False, True, True]
    assert (line.x, line.y, line.line.color) == ((1, 10), (3.0, 2.0), "#0072B2")
    assert (band.x, band.y) == ((1, 10, 10, 1), (3.5, 2.5, 1.5, 2.5))
    assert (bars.base, bars.x, limit.marker.symbol) == ((0, 2), (1, 3), "line-ns-open")
    assert (again.xaxis, bars.xaxis) == ("x2", "x3")
    layout = figure.layout
    assert layout.xaxis.type == "log" and layout.yaxis3.range == (1.5, -0.5)
    assert layout.xaxis.domain[1] <= layout.xaxis2.domain[0]
    assert layout.yaxis3.domain[1] <= layout.yaxis.domain[0]


@pytest.mark.parametrize(
    ("x", "distance"), [([0, 2, 4], 1), ([0, 40], None), ([0.5, 2], None), ([], None)]
)
def test_a_few_whole_steps_have_no_halves_between_them(x, distance):
    layout = Plotly(Figure([[Panel([Line("", x, x)], "steps")]], "").plotly()).layout
    assert layout.xaxis.dtick == distance


def test_the_picture_has_every_colour_and_one_bundle_holds_both(drawn):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(drawn.png()))[..., :3]
    for colour in ("#0072B2", "#009E73", "black"):
        assert (abs(pixels - to_rgb(colour)).max(axis=2) < 0.01).sum() > 50
    bundle = drawn._repr_mimebundle_()
    assert bundle["text/plain"] == "loss and reads"
    assert {"image/png", "application/vnd.plotly.v1+json"} < bundle.keys()


def test_growth_draws_the_predictions_beside_what_was_measured():
    record = speed.load_benchmark(FULL)
    rows = speed.growth(record, geometry.geometry("phi-4")).rows  # in depth, batch, sequence
    for row, points in zip(
        rows, ([4, 8, 16, 24, 40], [1, 8, 32, 128], [16, 128, 512]), strict=True
    ):
        for panel, allowed in zip(row, (0.35, 0.05), strict=True):  # time, memory
            measured, predicted = panel.parts
            assert list(measured.x) == list(predicted.x) == points
            assert predicted.y == pytest.approx(measured.y, rel=allowed)
    other = speed.growth(record, geometry.geometry("smollm2"))  # not the model that was measured
    assert [len(panel.parts) for panel in other.rows[0]] == [1, 1]
    record["rows"] = record["rows"][:3]
    assert "nothing to draw" in speed.growth(record, geometry.geometry("phi-4"))


def test_a_peer_whose_limit_is_unknown_has_no_mark():
    record = speed.load_benchmark(FULL.parents[1] / "gpu" / FULL.name)
    *systems, limits = speed.sample_times(record).rows[0][0].parts
    unknown = [row["system"] for row in record["rows"] if row["percent_of_limit"] is None]
    n_points = sum(len(points.x) for points in systems)
    assert n_points == len(record["rows"]) and len(limits.x) == n_points - len(unknown)
    assert set(unknown) == {"soup", "in_memory"}
    json.dumps(speed.sample_times(record).plotly(), allow_nan=False)


def test_a_logarithmic_axis_has_no_half_steps():
    steps = Panel([Line("", [1, 4, 16], [3.0, 2.0, 1.0])], "steps", log_x=True)
    assert Plotly(Figure([[steps]], "").plotly()).layout.xaxis.ticktext == ("1", "2", "5", "10")
    one = Panel([Line("", [1], [3.0])], "steps", log_x=True)
    assert Plotly(Figure([[one]], "").plotly()).layout.xaxis.ticktext == ("1",)


def test_steps_have_whole_ticks_and_decades_plain_numbers():
    few, many = ([Line("", [0, n], [0.2, 0.04])] for n in (2, 500))
    panels = [Panel(few, "steps", log_y=True), Panel(many, "steps")]
    layout = Plotly(Figure([panels], "").plotly()).layout
    assert (layout.xaxis.dtick, layout.xaxis2.dtick) == (1, None)
    assert layout.yaxis.ticktext == ("0.05", "0.1", "0.2")
    assert layout.yaxis2.ticktext is None


def test_a_colour_bar_says_what_the_colours_of_lines_mean():
    scale = Scale("decoder layer", 0, 29)
    assert (scale.colour(0), scale.colour(29)) == ("#440154", "#fde725")
    lines = [Line("", [1, 2], [1.0, 2.0], colour=scale.colour(layer)) for layer in (0, 29)]
    figure = Figure([[Panel(lines, "x", scale=scale)] * 2], "norms")
    layout = Plotly(figure.plotly()).layout
    assert layout.coloraxis.colorbar.title.text == "decoder layer"
    assert (layout.coloraxis2.cmin, layout.coloraxis2.cmax) == (0, 29)
    assert layout.xaxis.domain[1] == layout.coloraxis.colorbar.x < layout.xaxis2.domain[0]
    assert figure.png() != Figure([[Panel(lines, "x")] * 2], "norms").png()


def test_parallel_coordinates_place_settings_in_order_and_losses_to_scale():
    axes = {"learning_rate": [1e-2, 1e-3, 1e-1], "layers": ["all", "ends:4", "all"]}
    drawn = Parallel(axes | {"loss": [2.0, 3.0, 2.5]}, "runs")
    (trace,) = Plotly(drawn.plotly()).data
    rate, layers, loss = trace.dimensions
    assert (rate.values, rate.ticktext) == ((1, 0, 2), ("0.001", "0.01", "0.1"))
    assert (layers.values, layers.ticktext) == ((0, 1, 0), ("all", "ends:4"))
    assert loss.values == trace.line.color == (2.0, 3.0, 2.5)
    assert drawn.png()[:4] == b"\x89PNG"
