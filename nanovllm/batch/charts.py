"""Charts as inline SVG. Colours come from the page's classes `a` and `b`, so that they follow its light or dark theme."""

import html
import math
from typing import NamedTuple

WIDTH, HEIGHT = 960, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 24  # margins for the axes' labels
BARS_WIDTH = 440


class Series(NamedTuple):
    """A curve: one value for each part of the time."""

    name: str
    css: str
    values: list[float]


def time_chart(series: list[Series], bin_seconds: float, top: float | None = None) -> str:
    """Curves over time.

    Args:
        series: all of one length.
        bin_seconds: how long a part is.
        top: the end of the vertical axis; chosen if None.
    """
    length = max((len(one.values) for one in series), default=0)
    end = max(length, 1) * bin_seconds
    ticks = _ticks(top or max((value for one in series for value in one.values), default=0.0))
    top = top or ticks[-1]
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = _horizontal_lines(ticks, top, WIDTH)
    unit, divisor = ("h", 3600) if end > 7200 else ("min", 60) if end > 180 else ("s", 1)
    for tick in _ticks(end / divisor):
        if tick <= end / divisor:
            x = LEFT + plot_width * tick * divisor / end
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{tick:g} {unit}</text>')
    for one in series:
        points = [
            (LEFT + plot_width * (index + 0.5) * bin_seconds / end, TOP + plot_height * (1 - min(value / top, 1)))
            for index, value in enumerate(one.values)
        ]
        if not points:
            continue
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        floor = TOP + plot_height
        parts.append(f'<path class="area {one.css}" d="{line}L{points[-1][0]:.1f} {floor}L{points[0][0]:.1f} {floor}Z"/>')
        parts.append(f'<path class="line {one.css}" d="{line}"/>')
    return _svg(parts, WIDTH)


def bar_chart(labels: list[str], values: list[int], css: str) -> str:
    """Bars, each with its label below and its value in a tooltip."""
    ticks = _ticks(max(values, default=0))
    parts = _horizontal_lines(ticks, ticks[-1], BARS_WIDTH)
    step = (BARS_WIDTH - LEFT - RIGHT) / max(len(values), 1)
    plot_height = HEIGHT - TOP - BOTTOM
    for index, (label, value) in enumerate(zip(labels, values, strict=True)):
        x, height = LEFT + step * index, plot_height * value / ticks[-1]
        width = min(step * 0.84, 48)
        place = f'x="{x + (step - width) / 2:.1f}" y="{TOP + plot_height - height:.1f}" width="{width:.1f}"'
        tooltip = f"<title>{html.escape(label)}: {value:,}</title>"
        parts.append(f'<rect class="{css}" {place} height="{height:.1f}" rx="2">{tooltip}</rect>')
        parts.append(f'<text x="{x + step / 2:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(label)}</text>')
    return _svg(parts, BARS_WIDTH)


def _svg(parts: list[str], width: int) -> str:
    return f'<svg viewBox="0 0 {width} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _horizontal_lines(ticks: list[float], top: float, width: int) -> list[str]:
    parts = []
    for tick in ticks:
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - tick / top)
        parts.append(f'<line class="grid-line" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    return parts


def _ticks(largest: float) -> list[float]:
    """Four to six round numbers from 0 to the first that is not below `largest`."""
    if largest <= 0:
        return [0.0, 1.0]
    rough = largest / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= rough)
    return [step * index for index in range(math.ceil(largest / step - 1e-9) + 1)]


def _short(value: float) -> str:
    """A number of few characters: 1.5k, 20M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"
