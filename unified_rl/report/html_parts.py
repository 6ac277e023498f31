"""Building blocks of the HTML report: escaping, inline pictures, tables, line charts as SVG. No script, no links."""

from __future__ import annotations

import base64
import html
import math
from dataclasses import dataclass

import numpy as np

from unified_rl.report.figures import LIKELIHOOD_FILLS, png_bytes, upscale, visible


def escape(text: object) -> str:
    """Text safe inside elements and quoted attributes."""
    return html.escape(str(text), quote=True)


def inline_image(image: np.ndarray, alt: str, side: int = 128) -> str:
    """`<img>` with the picture inside, enlarged in whole multiples without smoothing."""
    picture = upscale(image, side)
    data = base64.b64encode(png_bytes(picture)).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img src="data:image/png;base64,{data}" {size} alt="{escape(alt)}">'


def table(caption: str, header: list[str], rows: list[list[str]]) -> str:
    """Table of HTML cells with column and row headers; every cell but the first is right-aligned by the style."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def mark(ok: bool | None) -> str:
    """A sign of correctness that does not depend on colour alone."""
    if ok is None:
        return ""
    return '<span class="mark ok">\u2713 correct</span>' if ok else '<span class="mark no">\u2717 wrong</span>'


def token_line(tokens: list[str], log_probs: list[float]) -> str:
    """Text pieces on the colours of their likelihood, with the probability in figures below each."""
    parts = []
    for token, log_prob in zip(tokens, log_probs, strict=True):
        probability = math.exp(log_prob)
        level = next(i for i, (bound, _) in enumerate(LIKELIHOOD_FILLS) if probability >= bound)
        parts.append(f'<span class="tok l{level}">{escape(visible(token))}<small>{probability:.2f}</small></span>')
    return f'<p class="tokens">{"".join(parts)}</p>'


@dataclass(frozen=True)
class Series:
    """One line of a chart; points with a missing value are left out before."""

    label: str
    points: list[tuple[float, float]]


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 240, 58, 14, 14, 42
MOST_POINTS = 400


def chart(title: str, x_label: str, series: list[Series], note: str = "") -> str:
    """Line chart as a figure with inline SVG; empty text when no series has a point."""
    drawn = [Series(s.label, thin(s.points)) for s in series if s.points]
    if not drawn:
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), whole=True), ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for tick in y_ticks:
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x = place(tick, y_low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(tick)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for i, s in enumerate(drawn):
        dots = [place(x, y) for x, y in s.points]
        if len(dots) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
            parts.append(f'<polyline class="line s{i}" points="{path}"/>')
        if len(dots) <= 40:
            parts += [_dot(i, x, y) for x, y in dots]
    description = "; ".join(f"{s.label}: {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in drawn)
    legend = "".join(
        f'<li><span class="key k{i}" aria-hidden="true"></span>{escape(s.label)}</li>' for i, s in enumerate(drawn)
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}. {escape(description)}">'
        f'{"".join(parts)}</svg><ul class="legend">{legend}</ul>'
        + (f"<p>{escape(note)}</p>" if note else "")
        + "</figure>"
    )


def _dot(i: int, x: float, y: float) -> str:
    if i % 2:  # another shape, so that lines differ without colour
        return f'<rect class="dot d{i}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
    return f'<circle class="dot d{i}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means over equal parts of a longer line."""
    if len(points) <= MOST_POINTS:
        return points
    parts = np.array_split(np.asarray(points, dtype=np.float64), MOST_POINTS)
    return [(float(p[:, 0].mean()), float(p[:, 1].mean())) for p in parts]


def ticks(low: float, high: float, whole: bool = False, count: int = 4) -> list[float]:
    """Round numbers that span [low, high] (inside it when `whole`), about `count` steps of 1, 2 or 5 times 10^n."""
    if high - low <= abs(high) * 1e-9:
        low, high = (low, low + 1) if whole else (low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, round(step))
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number in at most four significant digits, without an exponent between 0.001 and 100000."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
