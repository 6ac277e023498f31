"""What SRUM's judge saw, as a picture: the image, its regions with their scores, and the reward map over the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from unified_rl.report.figures import INK, LINE, MUTED, PAPER, draw_mark, font, stacked, upscale, wrap
from unified_rl.report.truth import Judged

SIDE, LEAST_WIDTH = 320, 170  # longer side of each of the three panels, about; what titles and legend need
MARGIN, GAP, HEAD, FOOT = 10, 16, 24, 40
TITLE, TAG = 15, 13  # font sizes
# Blue attracts, orange repels: a pair that stays apart for readers who do not tell red from green.
GOOD, NEUTRAL, BAD, UNREAD = (33, 113, 181), (247, 247, 247), (201, 79, 12), (110, 116, 126)
VEIL = 0.72  # share of the map's colour over the image, which shows through in pale grey
MOST_NUMBERS = 64  # cells up to which their rewards are written into them

Colour = tuple[int, int, int]


def srum_overlay(
    image: np.ndarray,
    boxes: Sequence[Sequence[int]],
    scores: Sequence[float | None],
    reward_map: np.ndarray | None,
    alpha: float | None,
) -> np.ndarray:
    """Three panels side by side, uint8 [H', W', 3]: the image, its boxes with scores, the reward map over the image.

    Args:
        image: uint8 [H, W, 3]; small ones are enlarged in whole steps without smoothing.
        boxes: K boxes (x1, y1, x2, y2) in pixels of the image.
        scores: K scores in -1..1, None for a region that could not be read (drawn dashed, with a question mark).
        reward_map: [h, w] in -1..1, R on the grid; None leaves the third panel out.
        alpha: the global factor, by which the map is multiplied; None with the map.

    Raises:
        ValueError: not one score for each box, or a map without alpha.
    """
    if len(boxes) != len(scores) or (reward_map is None) != (alpha is None):
        raise ValueError(
            f"{len(boxes)} boxes with {len(scores)} scores, a map that is {reward_map is not None} or alpha"
        )
    shown = upscale(image, SIDE)
    panels = [("image", shown), ("regions and scores", regions_panel(shown, image.shape[:2], boxes, scores))]
    if reward_map is not None and alpha is not None:
        panels.append((f"reward: alpha {alpha:.2f} x R", map_panel(shown, alpha * np.asarray(reward_map))))
    width = max(shown.width, LEAST_WIDTH)
    foot = MARGIN if reward_map is None else FOOT
    size = (len(panels) * (width + GAP) - GAP + 2 * MARGIN, MARGIN + HEAD + shown.height + foot)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    top = MARGIN + HEAD
    for i, (title, panel) in enumerate(panels):
        left = MARGIN + i * (width + GAP)
        draw.text((left, MARGIN), title, font=font(TITLE), fill=INK)
        picture.paste(panel, (left, top))
        draw.rectangle((left, top, left + shown.width - 1, top + shown.height - 1), outline=LINE)
    if reward_map is not None:
        draw_legend(draw, MARGIN + 2 * (width + GAP), top + shown.height + 8, width)
    return np.asarray(picture)


def judged_overlay(judged: Judged) -> np.ndarray:
    """`srum_overlay` of an image with its record."""
    score = judged.score
    boxes, scores = ([region[name] for region in score.regions] for name in ("box", "score"))
    reward = score.tensors.get("reward_map")
    return srum_overlay(
        judged.image, boxes, scores,
        None if reward is None else reward.numpy(), None if reward is None else score.components["alpha"],
    )  # fmt: skip


def judged_line(judged: Judged) -> str:
    """Reward and global score in words."""
    whole = judged.score.components.get("global_score")
    return f"reward {judged.score.reward:+.3f}" + ("" if whole is None else f", whole image {whole:+.2f}")


def overlay_sheet(judged: Sequence[Judged]) -> Image.Image:
    """Overlays below one another, each under its prompt and scores."""
    rows = []
    for item in judged:
        overlay = Image.fromarray(judged_overlay(item))
        row = Image.new("RGB", (overlay.width, overlay.height + 46), PAPER)
        row.paste(overlay, (0, 46))
        draw = ImageDraw.Draw(row)
        draw.text((MARGIN, 8), wrap(item.prompt, row.width - 2 * MARGIN, 17, 1)[0], font=font(17), fill=INK)
        left = MARGIN
        if item.correct is not None:
            draw_mark(draw, MARGIN, 31, item.correct, 16)
            left += 24
        draw.text((left, 31), judged_line(item), font=font(TITLE), fill=MUTED)
        rows.append(row)
    return stacked(rows)


def diverging(value: float) -> Colour:
    """Colour of a reward in -1..1: orange, white at 0, blue."""
    end = GOOD if value >= 0 else BAD
    share = min(1.0, abs(value)) ** 0.8  # small rewards are to be told from none
    return tuple(round(n + (e - n) * share) for n, e in zip(NEUTRAL, end, strict=True))


def sign_colour(score: float | None) -> Colour:
    """Colour of a region's frame and label."""
    if score is None or score == 0:
        return UNREAD
    return GOOD if score > 0 else BAD


def number_text(value: float | None) -> str:
    """A reward with its sign; a question mark where it could not be read."""
    if value is None:
        return "?"
    return f"{value:+.2f}" if round(value, 2) else "0.00"


def regions_panel(
    shown: Image.Image, size: tuple[int, int], boxes: Sequence[Sequence[int]], scores: Sequence[float | None]
) -> Image.Image:
    """The enlarged image with frames and labels; `size` is (H, W) of the image that the boxes are in."""
    panel = shown.copy()
    draw = ImageDraw.Draw(panel)
    down, across = shown.height / size[0], shown.width / size[1]
    corners = [(round(b[0] * across), round(b[1] * down), round(b[2] * across), round(b[3] * down)) for b in boxes]
    # PIL's corners belong to the frame; a box that is less than a pixel here still gets one.
    places = [(x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)) for x1, y1, x2, y2 in corners]
    # Large before small, so that a small box inside a large one stays visible.
    order = sorted(range(len(boxes)), key=lambda i: -(places[i][2] - places[i][0]) * (places[i][3] - places[i][1]))
    for i in order:
        draw_frame(draw, places[i], sign_colour(scores[i]), dashed=scores[i] is None)
    taken: list[tuple[int, int, int, int]] = []
    for i in reversed(order):
        score = scores[i]
        text = f"{i + 1}: {number_text(score)}"
        taken.append(draw_tag(draw, places[i], text, sign_colour(score), taken, panel.size))
    return panel


def draw_frame(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: Colour, dashed: bool) -> None:
    """A frame inside a box: colour between white lines, so that it shows on any image."""
    x1, y1, x2, y2 = box
    if not dashed:
        for inset, fill in ((0, PAPER), (1, colour), (2, colour), (3, PAPER)):
            if x2 - x1 > 2 * inset and y2 - y1 > 2 * inset:
                draw.rectangle((x1 + inset, y1 + inset, x2 - inset, y2 - inset), outline=fill)
        return
    draw.rectangle(box, outline=PAPER, width=2)
    for x in range(x1, x2, 9):
        for y in (y1, y2 - 1):
            draw.line((x, y, min(x + 4, x2), y), fill=colour, width=2)
    for y in range(y1, y2, 9):
        for x in (x1, x2 - 1):
            draw.line((x, y, x, min(y + 4, y2)), fill=colour, width=2)


def draw_tag(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    text: str,
    colour: Colour,
    taken: Sequence[tuple[int, int, int, int]],
    size: tuple[int, int],
) -> tuple[int, int, int, int]:
    """Label in the first corner of the box where it hides no other label; returns the place it takes."""
    width, height = round(font(TAG).getlength(text)) + 8, TAG + 6
    lefts, tops = (box[0] + 2, box[2] - width - 1), (box[1] + 2, box[3] - height - 1)
    corners = [(x, y) for y in tops for x in lefts]
    corners += [(lefts[0], tops[0] + step * height) for step in range(1, 12)]  # then further down its left side
    places = []
    for x, y in corners:
        x, y = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
        places.append((x, y, x + width, y + height))
    place = next((p for p in places if not any(_meet(p, t) for t in taken)), places[0])
    draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=colour, outline=PAPER)
    draw.text((place[0] + 4, place[1] + 2), text, font=font(TAG), fill=PAPER)
    return place


def _meet(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def map_panel(shown: Image.Image, weights: np.ndarray) -> Image.Image:
    """The enlarged image in grey under the colours of [h, w] rewards, which are written in where there is room."""
    rows, columns = weights.shape
    colours = np.array([[diverging(float(v)) for v in row] for row in weights], dtype=np.uint8)
    cells = Image.fromarray(colours).resize(shown.size, Image.Resampling.NEAREST)
    # Pale, so that the colours of the map are those of the legend on dark images as well.
    grey = shown.convert("L").point(lambda level: 120 + level * 135 // 255).convert("RGB")
    panel = Image.blend(grey, cells, VEIL)
    draw = ImageDraw.Draw(panel)
    across, down = shown.width / columns, shown.height / rows
    face = font(TAG)
    if rows * columns <= MOST_NUMBERS and across >= face.getlength("+0.00") + 2 and down >= TAG + 4:
        for row in range(rows):
            for column in range(columns):
                middle = (round((column + 0.5) * across), round((row + 0.5) * down))
                draw.text(
                    middle,
                    number_text(float(weights[row, column])),
                    font=face,
                    fill=INK,
                    anchor="mm",
                    stroke_width=2,
                    stroke_fill=PAPER,
                )
    return panel


def draw_legend(draw: ImageDraw.ImageDraw, left: int, top: int, width: int) -> None:
    """The scale from -1 to 1 as a bar of colours with its ends and middle named."""
    for x in range(width):
        draw.line((left + x, top, left + x, top + 9), fill=diverging(2 * x / (width - 1) - 1))
    draw.rectangle((left, top, left + width - 1, top + 9), outline=LINE)
    for value, anchor in ((-1, "la"), (0, "ma"), (1, "ra")):
        x = left + round((value + 1) / 2 * (width - 1))
        draw.text((x, top + 12), ("-1 repels", "0", "+1 attracts")[value + 1], font=font(12), fill=MUTED, anchor=anchor)
