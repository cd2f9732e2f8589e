"""Charts as SVG: what is drawn where, for values that can be worked out by hand."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrinklefree.training.plots import Bar, Curve, Panel
from wrinklefree.training.run_report_charts import (
    BOTTOM,
    COLUMNS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    bar_chart,
    line_chart,
    moving_average,
    nice_ticks,
    short_number,
    tick_labels,
)


def path_points(figure: str) -> list[list[tuple[float, float]]]:
    """For each path, its points; a gap begins a new list."""
    found = []
    for path in re.findall(r'<path class="curve[^"]*" d="([^"]*)"', figure):
        pieces = path.split("M")[1:]
        found += [[tuple(map(float, point.split(" "))) for point in piece.split("L")] for piece in pieces]
    return found


def test_a_line_goes_from_corner_to_corner():
    figure = line_chart(Panel("loss", [Curve("loss", [1, 2, 3], [0.0, 5.0, 10.0])]))
    [[first, middle, last]] = path_points(figure)
    room = HEIGHT - TOP - BOTTOM
    # 5% of air below and above: 10 units of value on a range of 11.
    assert first == pytest.approx((LEFT, HEIGHT - BOTTOM - 0.5 / 11 * room), abs=0.06)
    assert last == pytest.approx((WIDTH - RIGHT, TOP + 0.5 / 11 * room), abs=0.06)
    assert middle == pytest.approx(((first[0] + last[0]) / 2, (first[1] + last[1]) / 2), abs=0.06)
    assert "<b>loss</b>, last 10</figcaption>" in figure


def test_a_range_of_steps_is_shared():
    figure = line_chart(Panel("loss", [Curve("loss", [50, 100], [1.0, 2.0])], markers=True), x_range=(0, 100))
    [[first, last]] = path_points(figure)
    assert first[0] == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.06)
    assert last[0] == pytest.approx(WIDTH - RIGHT, abs=0.06)
    assert figure.count("<circle") == 2


def test_what_is_not_finite_leaves_a_gap_and_a_logarithm_needs_positive_values():
    curve = Curve("loss", [1, 2, 3, 4, 5], [1.0, math.nan, 100.0, 10.0, math.inf])
    pieces = path_points(line_chart(Panel("loss", [curve], log=True)))
    assert [len(piece) for piece in pieces] == [1, 2]
    # 10 is halfway between 1 and 100.
    assert pieces[1][1][1] == pytest.approx((pieces[0][0][1] + pieces[1][0][1]) / 2, abs=0.11)
    assert line_chart(Panel("loss", [Curve("loss", [1, 2], [math.nan, math.nan])])) == ""
    assert line_chart(Panel("loss", [Curve("loss", [1, 2], [0.0, -1.0])], log=True)) == ""
    assert line_chart(Panel("loss", [])) == ""


def test_a_long_curve_is_reduced_and_keeps_its_spikes():
    values = [1.0] * 100_000
    values[31_416] = 1e6
    values[70_000:71_000] = [math.nan] * 1000
    figure = line_chart(Panel("loss", [Curve("loss", range(100_000), values)]))
    pieces = path_points(figure)
    assert len(pieces) == 2
    points = [point for piece in pieces for point in piece]
    assert len(points) <= 2 * COLUMNS
    highest = min(points, key=lambda point: point[1])
    assert highest[0] == pytest.approx(LEFT + 0.31416 * (WIDTH - LEFT - RIGHT), abs=0.1)
    assert len(figure) < 30_000


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_a_constant_curve_has_an_axis(value):
    [points] = path_points(line_chart(Panel("scale", [Curve("scale", [7], [value])])))
    assert points == [pytest.approx(((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2), abs=0.06)]


def test_names_are_escaped_and_the_figure_is_well_formed():
    curves = [Curve("<script>a</script>", [1, 2], [1.0, 2.0]), Curve("b&c", [1, 2], [2.0, math.nan])]
    figure = line_chart(Panel('"><img src=x>', curves))
    ElementTree.fromstring(figure)
    assert "<script" not in figure
    assert "<img" not in figure
    assert "b&amp;c 2<" in figure
    ElementTree.fromstring(bar_chart([Bar("<b>", 1.0)], y_label="<i>"))


def test_bars_are_as_long_as_their_values():
    figure = bar_chart([Bar("one", 1.0), Bar("two", 2.0, 1.5, 4.0), Bar("nothing", math.nan)], y_label="bits")
    widths = [float(width) for width in re.findall(r'class="bar"[^>]* width="([\d.]+)"', figure)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    [interval] = re.findall(r'class="interval" d="M([\d.]+) \d+H([\d.]+)', figure)
    start = float(re.findall(r'class="bar" x="([\d.]+)"', figure)[0])
    low, high = map(float, interval)
    assert (low - start) / widths[1] == pytest.approx(0.75, abs=0.01)
    assert (high - start) / widths[1] == pytest.approx(2, abs=0.01)
    assert "nothing" not in figure
    assert bar_chart([], y_label="bits") == bar_chart([Bar("zero", 0.0)], y_label="bits") == ""


@given(low=st.floats(-1e9, 1e9, allow_nan=False), width=st.floats(1e-9, 1e9, allow_nan=False), count=st.integers(2, 10))
def test_ticks_are_inside_evenly_spaced_and_as_many_as_asked_for(low, width, count):
    high = low + width
    if not high > low or width < 1e-6 * abs(low):  # a float's last digits
        return
    ticks = nice_ticks(low, high, count)
    assert count / 2.5 - 1 <= len(ticks) <= count + 1
    assert all(low - 1e-6 * width <= tick <= high + 1e-6 * width for tick in ticks)
    assert len(set(tick_labels(ticks))) == len(ticks)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 0.5, 1], ["0", "0.5", "1"]),
        ([2.3451, 2.3452, 2.3453], ["2.3451", "2.3452", "2.3453"]),
        ([4000.0, 5000.0], ["4,000", "5,000"]),
        ([4000.5, 4000.7], ["4000.5", "4000.7"]),
        ([20_000, 40_000], ["20k", "40k"]),
        ([0.00025, 0.0005], ["0.00025", "0.0005"]),
        ([1e-5, 2.5e-5], ["1e-05", "2.5e-05"]),
        ([0.1 + 0.2, 0.4], ["0.3", "0.4"]),
    ],
)
def test_labels_tell_ticks_apart(values, labels):
    assert tick_labels(values) == labels


def test_numbers_for_people():
    assert [short_number(value) for value in (0, 3e9, -2.5e6, 12_345, 5462.4, 0.12345)] == [
        "0", "3B", "-2.5M", "12.35k", "5,462", "0.1235",
    ]  # fmt: skip


def test_the_moving_average_of_a_line_is_the_line_and_of_noise_its_mean():
    x = list(range(200))
    line = moving_average(Curve("loss", x, [2.0 * value for value in x]))
    assert line.y[5:-5] == pytest.approx([2.0 * value for value in x[5:-5]])
    noise = moving_average(Curve("loss", x, [value % 2 for value in x]))
    assert all(abs(value - 0.5) < 0.06 for value in noise.y[5:-5])
    gap = moving_average(Curve("loss", x, [math.nan] * 100 + [3.0] * 100))
    assert math.isnan(gap.y[50])
    assert gap.y[98] == gap.y[150] == 3.0


def test_smoothing_draws_both_curves_of_a_long_one_only():
    long = Curve("loss", range(100), [float(value % 7) for value in range(100)])
    smoothed = line_chart(Panel("loss", [long]), smooth=True)
    assert smoothed.count("<path") == 2
    assert smoothed.endswith("; thick: mean of the steps around</figcaption></figure>")
    assert line_chart(Panel("loss", [long])).count("<path") == 1
    short = Curve("loss", range(20), [1.0] * 20)
    assert line_chart(Panel("loss", [short]), smooth=True).count("<path") == 1
