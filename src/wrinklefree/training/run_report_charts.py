"""Charts as inline SVG: no image files, no script, colours that follow the page's light or dark theme.

A curve of a million steps would make a page of a hundred megabytes, so each is reduced to the smallest and the largest
value of every column of pixels: what is drawn is the same, spikes included.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from wrinklefree.training.plots import Bar, Curve, Panel

WIDTH, HEIGHT = 640, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 26
COLUMNS = 400
SMOOTHED = 0.05
SHORTEST_SMOOTHED = 60
"""Points of a curve that is smoothed."""
COLOURS = 8
"""Classes `c0` to `c7` of the page's style sheet."""

Point = tuple[float, float | None]
"""x, and y; None marks a gap."""


def line_chart(
    panel: Panel, *, x_label: str = "step", x_range: tuple[float, float] | None = None, smooth: bool = False
) -> str:
    """A figure of one panel: axes, a path for each curve, and each curve's last value below; empty without a point.

    Args:
        panel: The curves.
        x_label: What one unit of x is.
        x_range: Both ends of the x axis, so that charts below each other can be compared; the curves' own by default.
        smooth: Draw long curves faintly, and their moving average (`SMOOTHED` of the points) over them.
    """
    points = [
        (x, y) for curve in panel.curves for x, y in zip(curve.x, curve.y, strict=True) if _drawable(y, panel.log)
    ]
    if not points:
        return ""
    x_range = _widened(*(x_range or (min(x for x, _ in points), max(x for x, _ in points))), share=0.0)
    heights = [_height(y, panel.log) for _, y in points]
    y_range = _widened(min(heights), max(heights), share=0.05)

    def across(x: float) -> float:
        return LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        share = (_height(y, panel.log) - y_range[0]) / (y_range[1] - y_range[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    label = f"{panel.y_label} over {x_label}s"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    y_ticks = _log_ticks(*y_range) if panel.log else nice_ticks(*y_range, 5)
    for value, text in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = down(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    # There is no step 1.5.
    x_ticks = [value for value in nice_ticks(*x_range, 6) if value == round(value)]
    for value, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
        parts.append(f'<text class="tick" x="{across(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{text}</text>')
    for number, curve in enumerate(panel.curves):
        kept = list(_reduced(curve, panel.log, *x_range))
        smoothed = smooth and len(curve.x) >= SHORTEST_SMOOTHED
        colour = f"c{number % COLOURS}"
        parts.append(_line(kept, f"{colour} raw" if smoothed else colour, across, down, markers=panel.markers))
        if smoothed:
            mean = list(_reduced(moving_average(curve), panel.log, *x_range))
            parts.append(_line(mean, colour, across, down, markers=False))
    parts.append("</svg>")
    mean = "; thick: mean of the steps around" if any('raw"' in part for part in parts) else ""
    return f"<figure>{''.join(parts)}<figcaption>{_caption(panel)}{mean}</figcaption></figure>"


def bar_chart(bars: Sequence[Bar], *, y_label: str, digits: int = 3) -> str:
    """Horizontal bars from 0, each with its value and, where it has one, its interval; empty where none is above 0."""
    finite = [bar for bar in bars if math.isfinite(bar.value)]
    longest = max((bar.value if bar.high is None else bar.high for bar in finite), default=0.0)
    if longest <= 0:
        return ""
    row, label, value_room = 30, 150, 64
    room = WIDTH - label - value_room
    parts = [f'<svg viewBox="0 0 {WIDTH} {row * len(finite) + 8}" role="img" aria-label="{escape(y_label)} by model">']
    for number, bar in enumerate(finite):
        top, width = number * row + 6, max(bar.value, 0.0) / longest * room
        middle, end = top + 10, label + width
        parts.append(
            f'<text class="name" x="{label - 8}" y="{middle + 4}" text-anchor="end">{escape(bar.name)}</text>'
            f'<rect class="bar" x="{label}" y="{top}" width="{width:.1f}" height="20" rx="2"/>'
        )
        if bar.low is not None and bar.high is not None:
            low, high = (label + max(edge, 0.0) / longest * room for edge in (bar.low, bar.high))
            whiskers = f"M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8"
            parts.append(f'<path class="interval" d="{whiskers}"/>')
            end = max(end, high)
        parts.append(f'<text class="tick" x="{end + 6:.1f}" y="{middle + 4}">{bar.value:.{digits}f}</text>')
    parts.append("</svg>")
    return f"<figure>{''.join(parts)}<figcaption>{escape(y_label)}</figcaption></figure>"


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values between `low` and `high`: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Short labels (`1.5`, `20k`, `3M`, `2.5e-05`), right to a fiftieth of the ticks' distance."""
    if not values:
        return []
    slack = abs(values[-1] - values[0]) / max(len(values) - 1, 1) / 50
    for digits in range(3, 17):
        if all(abs(float(f"{value:.{digits}g}") - value) <= slack for value in values):
            return [short_number(value, digits) for value in values]
    return [str(value) for value in values]


def short_number(value: float, digits: int = 4) -> str:
    """A number for people: `1.5`, `4,000`, `20k`, `3M`, `2.5e-05`."""
    if value == 0:
        return "0"
    for limit, unit, suffix in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / unit:.{digits}g}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 1000 and digits <= 4 else f"{value:.{digits}g}"


def moving_average(curve: Curve) -> Curve:
    """The mean of the finite values around each point, `SMOOTHED` of all points wide; NaN where there is none."""
    reach = max(2, round(len(curve.y) * SMOOTHED / 2))
    # Running sums: the width of the window costs nothing.
    sums, counts = [0.0], [0]
    for y in curve.y:
        sums.append(sums[-1] + (y if math.isfinite(y) else 0.0))
        counts.append(counts[-1] + math.isfinite(y))
    means: list[float] = []
    for at in range(len(curve.y)):
        low, high = max(0, at - reach), min(len(curve.y), at + reach + 1)
        inside = counts[high] - counts[low]
        means.append((sums[high] - sums[low]) / inside if inside else math.nan)
    return Curve(curve.name, curve.x, means)


def _caption(panel: Panel) -> str:
    """What is drawn, and where each curve ended."""
    scale = " (logarithmic)" if panel.log else ""
    ends = [
        (number, curve.name, next((y for y in reversed(curve.y) if math.isfinite(y)), None))
        for number, curve in enumerate(panel.curves)
    ]
    if len(ends) == 1:
        value = ends[0][2]
        last = "" if value is None else f", last {short_number(value)}"
        return f"<b>{escape(panel.y_label)}</b>{scale}{last}"
    keys = "".join(
        f' <span class="key"><i class="c{number % COLOURS}"></i>{escape(name)}'
        f"{'' if value is None else ' ' + short_number(value)}</span>"
        for number, name, value in ends
    )
    return f"<b>{escape(panel.y_label)}</b>{scale}{keys}"


def _line(
    points: Sequence[Point],
    colour: str,
    across: Callable[[float], float],
    down: Callable[[float], float],
    *,
    markers: bool,
) -> str:
    """The curve in the classes `colour`, and dots on its points where they are few or stand alone."""
    commands: list[str] = []
    pen_down = False
    for x, y in points:
        if y is not None:
            commands.append(f"{'L' if pen_down else 'M'}{across(x):.1f} {down(y):.1f}")
        pen_down = y is not None
    drawn = f'<path class="curve {colour}" d="{"".join(commands)}"/>'
    if markers or len(commands) == 1:
        drawn += "".join(
            f'<circle class="dot {colour}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3"/>'
            for x, y in points
            if y is not None
        )
    return drawn


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between the exponents; with their doubles and fives where those would be too few."""
    factors = (1,) if high - low > 2 else (1, 2, 5)
    decades = range(math.floor(low), math.ceil(high) + 1)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    return [value for value in values if low <= math.log10(value) <= high]


def _reduced(curve: Curve, log: bool, low: float, high: float) -> Iterator[Point]:
    """Points of a curve, at most two a column of pixels; a column without a point that can be drawn is a gap."""
    if len(curve.x) <= 2 * COLUMNS:
        for x, y in zip(curve.x, curve.y, strict=True):
            yield x, y if _drawable(y, log) else None
        return
    columns: dict[int, list[tuple[float, float]]] = {}
    for x, y in zip(curve.x, curve.y, strict=True):
        inside = columns.setdefault(int((x - low) / (high - low) * (COLUMNS - 1)), [])
        if _drawable(y, log):
            inside.append((x, y))
    for _, inside in sorted(columns.items()):
        if not inside:
            yield low, None
            continue
        yield from sorted({min(inside, key=_value), max(inside, key=_value)})


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _drawable(y: float, log: bool) -> bool:
    return math.isfinite(y) and (y > 0 or not log)


def _height(y: float, log: bool) -> float:
    return math.log10(y) if log else y


def _widened(low: float, high: float, *, share: float) -> tuple[float, float]:
    """The range with some air; a single value gets a range around it."""
    if low == high:
        return low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    air = (high - low) * share
    return low - air, high + air
