"""Pictures drawn with PIL: before and after, captioned grids, the group view, token likelihood strips."""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unified_rl.manifests import store
from unified_rl.report.truth import Group, Truth, evaluation_images, pictured_prompts

PAPER, INK, MUTED, LINE = (255, 255, 255), (28, 32, 38), (92, 100, 112), (214, 219, 226)
RIGHT, WRONG = (22, 128, 61), (190, 30, 45)
# Lower bound of the probability, fill; the pieces of a text are coloured from unlikely to likely.
LIKELIHOOD_FILLS = (
    (0.8, (33, 113, 181)), (0.5, (107, 174, 214)), (0.2, (189, 215, 231)),
    (0.05, (254, 224, 182)), (0.01, (253, 174, 97)), (0.0, (215, 88, 60)),
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One prompt drawn with the same seed before and after; `*_ok` is None without a detector."""

    prompt: str
    before: np.ndarray
    after: np.ndarray
    before_ok: bool | None
    after_ok: bool | None
    before_reward: float
    after_reward: float


def picture_pairs(truth: Truth) -> list[Pair]:
    """Pairs of the pictured prompts, base against the last evaluated weights; empty before both are evaluated."""
    if 0 not in truth.scores or truth.last is None:
        return []
    base, tuned = truth.scores[0], truth.scores[truth.last]
    ids = pictured_prompts(base)
    before, after = (evaluation_images(truth, k, ids) for k in (0, truth.last))
    pairs = []
    for prompt_id in ids:
        old, new = base["prompts"][prompt_id], tuned["prompts"][prompt_id]
        marks = [o["correct"][0] if "correct" in o else None for o in (old, new)]
        pairs.append(
            Pair(old["text"], before[prompt_id], after[prompt_id], *marks, old["rewards"][0], new["rewards"][0])
        )
    return pairs


def png_bytes(picture: Image.Image) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """PIL's own font, so that no font has to be installed."""
    return ImageFont.load_default(size)


def upscale(image: np.ndarray, side: int) -> Image.Image:
    """Picture with its longer side near `side` pixels: whole multiples without smoothing, or reduced with it."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    factor = side / max(height, width)
    if factor >= 1:
        return picture.resize((width * int(factor), height * int(factor)), Image.Resampling.NEAREST)
    return picture.resize((max(1, round(width * factor)), max(1, round(height * factor))), Image.Resampling.LANCZOS)


def draw_mark(draw: ImageDraw.ImageDraw, x: int, y: int, ok: bool, size: int = 18) -> None:
    """A tick on green or a cross on red, `size` pixels wide, with its top left corner at (x, y)."""
    draw.ellipse((x, y, x + size, y + size), fill=RIGHT if ok else WRONG, outline=PAPER)
    u = size / 18
    strokes = [((5, 9), (8, 12)), ((8, 12), (13, 6))] if ok else [((6, 6), (12, 12)), ((12, 6), (6, 12))]
    for (ax, ay), (bx, by) in strokes:
        draw.line((x + ax * u, y + ay * u, x + bx * u, y + by * u), fill=PAPER, width=max(2, round(2 * u)))


def _draw_lines(draw: ImageDraw.ImageDraw, x: int, y: int, lines: list[str], size: int, fill: tuple) -> int:
    for line in lines:
        draw.text((x, y), line, font=font(size), fill=fill)
        y += round(size * 1.3)
    return y


def wrap(text: str, width: int, size: int, most: int = 3) -> list[str]:
    """Lines of about `width` pixels at a font size; at most `most`, the last one shortened."""
    return textwrap.wrap(text, max(8, int(width / (size * 0.52))), max_lines=most, placeholder=" ...") or [""]


def before_after(pairs: list[Pair], columns: int = 3, side: int = 128) -> Image.Image:
    """Cards with prompt, picture before, picture after, and a mark of correctness where a detector exists."""
    gap, head, text = 16, 56, 62
    card = (2 * side + 3 * gap // 2, text + side + 22)
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    size = (columns * (card[0] + gap) + gap, head + rows * (card[1] + gap))
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((gap, 10), "Same prompts, same seeds", font=font(20), fill=INK)
    draw.text((gap, 35), "left: before training, right: after", font=font(14), fill=MUTED)
    for i, pair in enumerate(pairs):
        x, y = gap + (i % columns) * (card[0] + gap), head + (i // columns) * (card[1] + gap)
        lines = wrap(pair.prompt, card[0], 15)
        _draw_lines(draw, x, y + text - 4 - 20 * len(lines), lines, 15, INK)
        for j, (image, ok) in enumerate(((pair.before, pair.before_ok), (pair.after, pair.after_ok))):
            left = x + j * (side + gap)
            shown = upscale(image, side)
            picture.paste(shown, (left, y + text))
            draw.rectangle((left - 1, y + text - 1, left + shown.width, y + text + shown.height), outline=LINE)
            draw.text((left, y + text + side + 5), ("before", "after")[j], font=font(13), fill=MUTED)
            if ok is not None:
                draw_mark(draw, left + side - 17, y + text + side + 4, ok, 16)
    return picture


def caption_grid(
    items: list[tuple[np.ndarray, list[str], bool | None]], columns: int = 4, side: int = 128
) -> Image.Image:
    """Grid of (image, caption lines, mark) with the captions drawn under the images."""
    gap, size = 10, 13
    wrapped = [[part for line in lines for part in wrap(line, side + gap, size, 4)] for _, lines, _ in items]
    height = side + 8 + round(max(len(lines) for lines in wrapped) * size * 1.3) + gap
    columns = min(columns, len(items))
    picture = Image.new("RGB", (columns * (side + 2 * gap), -(-len(items) // columns) * height + gap), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, ((image, _, ok), lines) in enumerate(zip(items, wrapped, strict=True)):
        x, y = gap + (i % columns) * (side + 2 * gap), gap + (i // columns) * height
        picture.paste(upscale(image, side), (x, y))
        if ok is not None:
            draw_mark(draw, x + side - 10, y + side - 10, ok, 16)
        _draw_lines(draw, x, y + side + 4, lines, size, INK)
    return picture


def evaluation_grid(truth: Truth, iteration: int) -> Image.Image:
    """The pictured prompts as one evaluation drew them, captioned with their rewards."""
    scores = truth.scores[iteration]
    ids = pictured_prompts(scores)
    images = evaluation_images(truth, iteration, ids)
    items = []
    for prompt_id in ids:
        outcome = scores["prompts"][prompt_id]
        ok = outcome["correct"][0] if "correct" in outcome else None
        items.append((images[prompt_id], [outcome["text"], f"reward {outcome['rewards'][0]:.3f}"], ok))
    return caption_grid(items)


def group_view(group: Group) -> Image.Image:
    """Samples of one prompt from the highest to the lowest advantage."""
    items = [(s.image, [f"A {s.advantage:+.2f}", f"reward {s.reward:.3f}"], s.correct) for s in group.samples]
    grid = caption_grid(items, columns=8, side=96)
    picture = Image.new("RGB", (max(grid.width, 480), grid.height + 30), PAPER)
    lines = wrap(group.prompt, picture.width - 20, 15, 1)
    ImageDraw.Draw(picture).text((10, 8), lines[0], font=font(15), fill=INK)
    picture.paste(grid, (0, 30))
    return picture


def token_strip(tokens: list[str], log_probs: list[float], label: str, width: int = 640) -> Image.Image:
    """Text pieces on fills that show how likely the judge found each one, with the probability below."""
    face, small = font(16), font(11)
    boxes, x, y = [], 10, 32
    for token, log_prob in zip(tokens, log_probs, strict=True):
        shown = visible(token)
        step = max(36, round(face.getlength(shown)) + 12)
        if x + step > width - 10:
            x, y = 10, y + 50
        boxes.append((x, y, step, shown, float(np.exp(log_prob))))
        x += step + 4
    picture = Image.new("RGB", (width, y + 50), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((10, 8), label, font=font(14), fill=INK)
    for x, y, step, shown, probability in boxes:
        fill = next(fill for bound, fill in LIKELIHOOD_FILLS if probability >= bound)
        draw.rounded_rectangle((x, y, x + step, y + 26), 4, fill=fill)
        draw.text((x + 6, y + 3), shown, font=face, fill=PAPER if fill == LIKELIHOOD_FILLS[0][1] else (0, 0, 0))
        draw.text((x + 6, y + 28), f"{probability:.2f}", font=small, fill=MUTED)
    return picture


def visible(token: str) -> str:
    """A text piece with its blanks and line breaks made visible."""
    return token.strip("\u2581 \u0120").replace("\n", "\\n") or "\u00b7"


def stacked(pictures: list[Image.Image]) -> Image.Image:
    """Pictures below one another."""
    width = max(p.width for p in pictures)
    result = Image.new("RGB", (width, sum(p.height for p in pictures)), PAPER)
    y = 0
    for picture in pictures:
        result.paste(picture, (0, y))
        y += picture.height
    return result


def group_strips(group: Group) -> Image.Image:
    """Token strips of the best and the worst sample of a group."""
    ends = (("best", group.samples[0]), ("worst", group.samples[-1]))
    return stacked(
        [token_strip(s.tokens, s.token_log_probs, f"{name} sample, reward {s.reward:.3f}") for name, s in ends]
    )


def write_before_after(truth: Truth) -> Path | None:
    """`RUN/before_after.png`; None while there is nothing to compare."""
    pairs = picture_pairs(truth)
    if not pairs:
        return None
    path = truth.run.path / "before_after.png"
    store(path, png_bytes(before_after(pairs)))
    return path
