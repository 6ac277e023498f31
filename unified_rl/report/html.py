"""`RUN/report.html`: one self-contained page without scripts or external resources."""

from __future__ import annotations

import re
from pathlib import Path

from unified_rl.config import RunConfig, to_yaml
from unified_rl.evaluation.compare import interval, label_of
from unified_rl.evaluation.scoring import Difference, compare_scores
from unified_rl.evaluation.summary import stored_evidence
from unified_rl.manifests import store
from unified_rl.report.figures import Pair, picture_pairs
from unified_rl.report.html_parts import Series, chart, escape, inline_image, mark, number, table, token_line
from unified_rl.report.overlay import judged_line, judged_overlay
from unified_rl.report.style import STYLE
from unified_rl.report.tensorboard import zero_std_share
from unified_rl.report.truth import (
    Group,
    Judged,
    Sample,
    Truth,
    detector_accuracy,
    first_shard,
    judged_ends,
    numbers,
    spread,
    widest_group,
)
from unified_rl.runtime import format_seconds

READ_ITERATIONS = 12
LISTED_REGIONS = 12
# Curves over optimiser steps: title, metrics shown together, how to read it.
STEP_CURVES = (
    ("KL to the base policy", ("kl",), "Nats per image token. A steep rise means the policy leaves the base behind."),
    ("Entropy of the image tokens", ("entropy",), "Nats per token. A fall towards 0 is collapse: all images alike."),
    ("Clip fraction", ("clip/low_fraction", "clip/high_fraction"), "Share of tokens whose gradient the bound stops."),
    (
        "Weights of the cells",
        ("weighted/weight_min", "weighted/weight_mean", "weighted/weight_max"),
        "Mean over the images of a step. All alike means that the reward does not tell cells apart.",
    ),
    ("Gradient norm", ("grad_norm",), "Before clipping."),
    ("Largest deviation of the ratio from 1", ("ratio/max_deviation",), "Near 0 in the first step of an iteration."),
    ("Loss", ("policy/loss",), "Not a measure of progress: advantages have mean 0."),
)


def comparison_section(truth: Truth) -> str:
    """Base against tuned with intervals, and the stored control."""
    if 0 not in truth.scores or truth.last is None:
        return section("Before and after", "<p>Not evaluated yet: base and trained weights are needed.</p>")
    config = truth.config
    rows = compare_scores(truth.scores[0], truth.scores[truth.last], config.evaluate.bootstrap, config.seed)
    cells = []
    for r in rows:
        scores = (score_cell(r.base, r.base_interval), score_cell(r.tuned, r.tuned_interval))
        cells.append([escape(label_of(r.name)), *scores, change_cell(r)])
    evaluated = truth.scores[0]
    note = (
        f"{len(evaluated['prompts'])} held-out prompts, {config.evaluate.samples_per_prompt} images each, same seeds; "
        f"weights after {truth.last} iterations. Brackets: bootstrap 95 % intervals "
        "over prompts or questions, paired for the change."
    )
    body = highlights(rows) + table("Scores of base and tuned weights", ["Score", "Base", "Tuned", "Change"], cells)
    return section("Before and after", body + f"<p>{escape(note)}</p>" + control_text(config))


def score_cell(value: float, bounds: tuple[float, float]) -> str:
    """A score with its interval."""
    return f'{value:.3f} <small class="own">[{bounds[0]:.2f}, {bounds[1]:.2f}]</small>'


def change_cell(row: Difference) -> str:
    """Change with its interval; an arrow where the interval excludes 0."""
    arrow = "\u25b2 " if row.low > 0 else "\u25bc " if row.high < 0 else ""
    kind = "up" if row.low > 0 else "down" if row.high < 0 else "flat"
    return f'<span class="{kind}">{arrow}{row.change:+.3f}</span> <small>[{row.low:+.3f}, {row.high:+.3f}]</small>'


def highlights(rows: list[Difference]) -> str:
    """The few numbers that matter, large."""
    names = ("overall", "reward_mean", "caption_ranking", "question_answering", "framed_answering")
    shown = [r for r in rows if r.name in names]
    cards = "".join(
        f'<div class="card"><dt>{escape(label_of(r.name))}</dt><dd>{r.base:.3f} <span aria-hidden="true">\u2192</span>'
        f'<span class="hidden"> to </span> {r.tuned:.3f}</dd></div>'
        for r in shown
    )
    return f'<dl class="cards">{cards}</dl>'


def control_text(config: RunConfig) -> str:
    """Stored result of the learning experiment and its controls."""
    evidence = stored_evidence(config)
    if evidence is None:
        return ""
    measured = [("drawing accuracy", evidence["gain"], evidence["controls"])]
    if "understanding_gain" in evidence:
        measured.append(("sampled answers", evidence["understanding_gain"], evidence["understanding_controls"]))
    text = ""
    for name, gain, controls in measured:
        rows = [["This method", interval(gain)]]
        rows += [[f"Control: {escape(kind.replace('_', ' '))}", interval(v)] for kind, v in controls.items()]
        text += table(f"Stored experiment over seeds: change of {name}, 95 % interval", ["Run", "Change"], rows)
    return text


def pictures_section(pairs: list[Pair]) -> str:
    """Cards with the same prompts and seeds before and after."""
    if not pairs:
        return ""
    cards = []
    for pair in pairs:
        shown = "".join(
            f"<figure>{inline_image(image, f'{pair.prompt}, {when} training')}<figcaption>{when} {mark(ok)}"
            f"<small>reward {reward:.3f}</small></figcaption></figure>"
            for when, image, ok, reward in (
                ("before", pair.before, pair.before_ok, pair.before_reward),
                ("after", pair.after, pair.after_ok, pair.after_reward),
            )
        )
        cards.append(f'<article class="pair"><h3>{escape(pair.prompt)}</h3><div>{shown}</div></article>')
    note = "The first prompts of every category and the first image of each, chosen before looking at the scores."
    return section("Pictures: same prompts, same seeds", f'<div class="pairs">{"".join(cards)}</div><p>{note}</p>')


def learning_section(truth: Truth, accuracies: list[tuple[float, float]]) -> str:
    """The judge's reward beside the accuracy that it cannot see."""
    # The reward of iteration k scores the weights after k iterations, as evaluation k does.
    training = [
        (float(k), truth.manifests[k, "reward"].extra["reward_mean"])
        for k in truth.scored()
        if "reward_mean" in truth.manifests[k, "reward"].extra
    ]
    held_out = {n: [(float(k), s[n]) for k, s in truth.scores.items() if n in s] for n in ("reward_mean", "overall")}
    series = [
        Series("held-out prompts, frozen judge", held_out["reward_mean"]),
        Series(f"training prompts, {truth.config.reward.judge} judge", training),
    ]
    if truth.config.reward.method == "gvu":
        charts = chart("Judge's reward", "weights after iteration", series, "What training maximises.")
    else:  # evaluation measures every method by the same likelihood, which is not on the scale of the reward
        charts = chart(
            "Judge's reward",
            "weights after iteration",
            series[1:],
            "Mean of the training images; -1..1 for SRUM, 0..1 for drawing tasks.",
        )
        charts += chart(
            "Likelihood of held-out prompts", "weights after iteration", series[:1],
            "How probable the judge finds the prompt, given the image. Not part of this method's reward.",
        )  # fmt: skip
    charts += chart(
        "Detector accuracy", "weights after iteration", [
            Series("held-out prompts", held_out["overall"]),
            Series("training prompts, first shard", accuracies),
        ], "The truth, which training never sees. A reward that rises while this falls is reward hacking.",
    )  # fmt: skip
    return section("Learning", f'<div class="charts">{charts}</div>') if charts else ""


def optimisation_section(truth: Truth) -> str:
    """Curves over optimiser steps."""
    charts = ""
    rows = [(float(step), numbers(row)) for step, row in enumerate(truth.steps, 1)]
    for title, names, note in STEP_CURVES:
        series = [Series(re.sub("[_/]", " ", n), [(step, r[n]) for step, r in rows if n in r]) for n in names]
        charts += chart(title, "optimiser step", series, note)
    return section("Optimisation", f'<div class="charts">{charts}</div>') if charts else ""


def group_section(group: Group | None) -> str:
    """Best and worst sample of the group whose rewards differ most."""
    if group is None:
        return ""
    ends = (("Best", group.samples[0]), ("Worst", group.samples[-1]))
    cards = "".join(sample_card(name, sample, group.prompt) for name, sample in ends)
    others = "".join(
        f"<li>{inline_image(s.image, f'sample {i} of {group.prompt}', 64)}<small>A {s.advantage:+.2f}</small></li>"
        for i, s in enumerate(group.samples, 1)
    )
    return section(
        "One group, seen by the judge",
        f"<p>Iteration {group.iteration}: <strong>{escape(group.prompt)}</strong>. The group of the first shard whose "
        f"rewards spread most.</p>{token_legend() if group.samples[0].tokens else ''}"
        f'<div class="samples">{cards}</div><p>All samples by advantage:</p><ul class="strip">{others}</ul>',
    )


def token_legend() -> str:
    """How to read the colours of the prompt's pieces."""
    scale = "".join(
        f'<span class="tok l{i}">{text}</span>'
        for i, text in enumerate(("\u2265 .80", "\u2265 .50", "\u2265 .20", "\u2265 .05", "\u2265 .01", "&lt; .01"))
    )
    return (
        "<p>Each piece of the prompt is coloured by how probable the judge finds it, given the image and the pieces "
        f'before; the reward is their geometric mean.</p><p class="tokens">{scale}</p>'
    )


def sample_card(name: str, sample: Sample, prompt: str) -> str:
    """One sample with its score and token likelihoods."""
    tokens = token_line(sample.tokens, sample.token_log_probs) if sample.tokens else ""
    return (
        f'<article class="sample">{inline_image(sample.image, f"{name} sample of {prompt}")}<div><h3>{name}</h3>'
        f"<p>reward {sample.reward:.3f}, advantage {sample.advantage:+.2f} {mark(sample.correct)}</p>"
        f"{tokens}</div></article>"
    )


def judged_section(iteration: int, best: list[Judged], worst: list[Judged]) -> str:
    """Images with their regions, the judge's scores and the reward maps made of them."""
    if not best:
        return ""
    body = (
        f"<p>Iteration {iteration}: the images of the first shard with the highest and the lowest reward. A region "
        "that could not be read is dashed, and counts as background. The map on the right is what training weights the "
        "cells of the image by, before the reference weight is added.</p>"
    )
    for title, judged in (("Highest reward", best), ("Lowest reward", worst)):
        if judged:
            body += f'<h3>{title}</h3><div class="overlays">{"".join(map(judged_card, judged))}</div>'
    return section("Regions, seen by the judge", body)


def judged_card(judged: Judged) -> str:
    """One image with its overlay and what the judge named in its regions."""
    overlay = judged_overlay(judged)
    items = "".join(f"<li>{region_text(region)}</li>" for region in judged.score.regions[:LISTED_REGIONS])
    more = len(judged.score.regions) - LISTED_REGIONS
    return (
        f'<article class="overlay"><h3>{escape(judged.prompt)}</h3><p>{judged_line(judged)} {mark(judged.correct)}</p>'
        f"{inline_image(overlay, f'{judged.prompt}: image, regions and reward map', max(overlay.shape))}"
        f"<ol>{items}</ol>" + (f"<p>and {more} regions more</p>" if more > 0 else "") + "</article>"
    )


def region_text(region: dict) -> str:
    """What the judge named in a region, its score and its reason."""
    score = "not read" if region["score"] is None else f"{region['score']:+.2f}"
    reason = f"<small>{escape(region['reason'])}</small>" if region["reason"] else ""
    return f"{escape(region['object'])} <strong>{score}</strong> {reason}"


def work_section(truth: Truth) -> str:
    """Where the time went and what the stages did."""
    totals: dict[str, float] = {}
    for (stage, _), seconds in truth.seconds.items():
        totals[stage] = totals.get(stage, 0.0) + seconds
    whole = sum(totals.values())
    body = ""
    if whole > 0:
        rows = [
            [
                escape(stage),
                format_seconds(s),
                f'{s / whole:.0%} <meter max="1" value="{s / whole:.3f}" aria-hidden="true"></meter>',
            ]
            for stage, s in totals.items()
        ]
        body = table(f"Time in stages, {format_seconds(whole)} in all", ["Stage", "Time", "Share"], rows)
    rows = []
    for k in truth.iterations("rollout"):
        counts = {s: truth.manifests[k, s].counts for s in ("rollout", "reward", "train") if (k, s) in truth.manifests}
        reward = truth.manifests[k, "reward"].extra.get("reward_mean") if "reward" in counts else None
        zero = zero_std_share(counts.get("train", {}))
        rows.append([
            str(k), str(counts["rollout"].get("images", "")), str(counts.get("reward", {}).get("failed", "")),
            "" if reward is None else number(reward), "" if zero is None else f"{zero:.1%}",
            str(counts.get("train", {}).get("steps", "")),
        ])  # fmt: skip
    header = ["Iteration", "Images", "Failed scores", "Mean reward", "Groups without spread", "Steps"]
    return section("Work done", body + (table("Iterations", header, rows) if rows else ""))


def section(title: str, body: str) -> str:
    """A part of the page under its heading."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def render(truth: Truth) -> str:
    """The whole page."""
    scored = truth.scored()
    accuracies, group, judged = [], None, ""
    for iteration in spread(scored, READ_ITERATIONS):
        rollouts, rewards = first_shard(truth, iteration)
        accuracy = detector_accuracy(rollouts)
        if accuracy is not None:
            accuracies.append((float(iteration), accuracy))
        if iteration == scored[-1]:
            group = widest_group(truth, iteration, rollouts, rewards)
            judged = judged_section(iteration, *judged_ends(rollouts, rewards))
    config = truth.config
    name = truth.run.path.resolve().name
    done = len(truth.iterations("train"))
    facts = (
        f"{config.reward.method} on {config.backbone.family}, {done} of {config.iterations} iterations, "
        f"{config.data.prompts_per_iteration} prompts of {config.rollout.group_size} images each, "
        f"{config.reward.judge} judge"
        + (f", control: {config.policy.control}" if config.policy.control != "none" else "")
    )
    return PAGE.format(
        title=escape(f"Run {name}"), facts=escape(facts), style=STYLE,
        body="".join((
            comparison_section(truth), pictures_section(picture_pairs(truth)), learning_section(truth, accuracies),
            judged, group_section(group), optimisation_section(truth), work_section(truth),
        )),
        config=escape(to_yaml(config)),
    )  # fmt: skip


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{facts}</p></header>
<main>{body}
<section><h2>Configuration</h2>
<details><summary>Everything that determined this run</summary><pre tabindex="0">{config}</pre></details></section>
</main>
</body>
</html>
"""


def write_report(truth: Truth) -> Path:
    """Write `RUN/report.html`; returns its path."""
    path = truth.run.path / "report.html"
    store(path, render(truth).encode())
    return path
