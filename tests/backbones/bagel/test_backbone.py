"""BAGEL behind the backbone interface, with a random tiny model: drawing, reading and writing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from unified_rl.backbones.bagel import flow
from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.bagel.context import Context
from unified_rl.backbones.bagel.flow import FlowSampling
from unified_rl.backbones.bagel.sequence import Text, pack
from unified_rl.backbones.bagel.writing import sample_text, score_text
from unified_rl.backbones.base import BackboneError, FlowTraj, check_text, stack_trajectories

PROMPTS = ["a red circle", "two rings left of a blue square"]
SEEDS = [5, 2**62, 7, 8, 9, 10]
IMAGE_PROMPTS = [prompt for prompt in PROMPTS for _ in range(3)]
PLAIN = FlowSampling(steps=6, eta=0.7, guidance_scale=1.0)
GUIDED = replace(PLAIN, guidance_scale=4.0)
WINDOW = replace(PLAIN, steps=9, guidance_scale=3.0, renorm="channel", sde_window=3, sde_before=7)
SETTINGS = pytest.mark.parametrize("sampling", [PLAIN, GUIDED, WINDOW], ids=["plain", "guided", "window"])


@pytest.fixture(scope="module")
def backbone(random_bagel_folder):
    return BagelBackbone.from_pretrained(random_bagel_folder)


@pytest.fixture
def fresh(random_bagel_folder):
    """One that a test may change."""
    return BagelBackbone.from_pretrained(random_bagel_folder)


def rows_of(trajectory, rows):
    return FlowTraj(
        trajectory.latents[rows], trajectory.steps[rows], trajectory.log_probs[rows], trajectory.final[rows]
    )


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


IMAGES = [picture(32, 32), picture(16, 24, 1), None, picture(50, 90, 2)]
QUESTIONS = ["What is it?", "yes no yes", "a red circle", "What is it? Plan it first."]


# ---- drawing ------------------------------------------------------------------------------------------------------


@SETTINGS
def test_replay_has_the_log_probabilities_of_the_rollout(backbone, sampling):
    """The difference is 0 where the matrix products of many rows are those of few."""
    drawn = backbone.rollout_images(PROMPTS, SEEDS, sampling)
    assert drawn.latents.shape == (6, sampling.decisions + 1, 6, 16)
    step = backbone.image_dist(IMAGE_PROMPTS, drawn, sampling)
    assert (step.log_prob(drawn.taken) - drawn.log_probs).abs().max() < 1e-6
    alone = backbone.image_dist(PROMPTS[1:], rows_of(drawn, [4]), sampling)
    assert ((alone.log_prob(drawn.taken[4:5]) - drawn.log_probs[4]).exp() - 1).abs().max() < 1e-4


@SETTINGS
def test_an_image_does_not_depend_on_its_batch(backbone, sampling):
    drawn = backbone.rollout_images(PROMPTS, SEEDS, sampling)
    group = backbone.rollout_images(PROMPTS[1:], SEEDS[3:], sampling)
    assert torch.equal(group.steps, drawn.steps[3:])
    assert (group.latents - drawn.latents[3:]).abs().max() < 1e-4
    assert (drawn.final[3] - drawn.final[4]).abs().max() > 0.1


@SETTINGS
def test_some_decisions_are_distributed_as_in_the_whole(backbone, sampling):
    drawn = backbone.rollout_images(PROMPTS, SEEDS, sampling)
    whole = backbone.image_dist(IMAGE_PROMPTS, drawn, sampling)
    some = backbone.image_dist(IMAGE_PROMPTS, drawn, sampling, [2, 0])
    assert (some.mean - whole.mean[:, [2, 0]]).abs().max() < 1e-5
    assert torch.equal(some.std, whole.std[:, [2, 0]])
    assert (whole.kl(whole) == 0).all()
    assert (whole.kl_to(drawn.taken, whole.reference(drawn.taken)) == 0).all()


def test_decisions_lie_in_the_window_of_the_group(backbone):
    drawn = backbone.rollout_images(PROMPTS, SEEDS, WINDOW)
    starts = [WINDOW.window_start(SEEDS[0])] * 3 + [WINDOW.window_start(SEEDS[3])] * 3
    assert len(set(starts)) == 2
    assert drawn.steps.tolist() == [[start, start + 1, start + 2] for start in starts]


@torch.no_grad()
def test_other_steps_are_those_of_the_ode(backbone):
    """From the last latent of the window on, and up to its first."""
    drawn = backbone.rollout_images(PROMPTS[:1], SEEDS[:1], WINDOW)
    times = flow.schedule(WINDOW.steps, WINDOW.shift).tolist()
    start, painter = int(drawn.steps[0, 0]), backbone.painter
    context = backbone._contexts(PROMPTS[:1], None)

    def along(x, steps):
        for i in steps:
            velocities = [
                painter.velocity(painter.layout.tiled(c.next_position), c, x, torch.tensor([times[i]]))
                for c in (context, Context.empty(1))
            ]
            velocity = flow.guided_velocity(*velocities, WINDOW) if WINDOW.guides_at(times[i]) else velocities[0]
            x = flow.euler_step(x, velocity, times[i], times[i + 1])
        return x

    noise = flow.normal_streams(SEEDS[:1], (4, 6, 16))[:, 0]
    assert start > 0
    assert (along(noise, range(start)) - drawn.latents[:, 0]).abs().max() < 1e-5
    assert (along(drawn.latents[:, -1], range(start + 3, 9)) - drawn.final).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_sde_without_noise_is_the_ode(backbone, scale):
    ode = backbone.rollout_images(PROMPTS, SEEDS, FlowSampling(steps=6, guidance_scale=scale))
    nearly = backbone.rollout_images(PROMPTS, SEEDS, FlowSampling(steps=6, guidance_scale=scale, eta=1e-6))
    assert (ode.final - nearly.final).abs().max() < 1e-4
    assert ode.log_probs.shape == (6, 0)
    with pytest.raises(BackboneError, match="no decisions"):
        backbone.image_dist(IMAGE_PROMPTS, ode, GUIDED)


@SETTINGS
def test_trajectories_come_back_from_records(backbone, sampling):
    for settings in (sampling, FlowSampling(steps=2)):
        drawn = backbone.rollout_images(PROMPTS, SEEDS, settings)
        again = stack_trajectories([drawn.tensors(row) for row in range(6)])
        for part in ("latents", "steps", "log_probs", "final"):
            assert torch.equal(getattr(again, part), getattr(drawn, part))


def test_guidance_and_prompt_matter(backbone):
    plain, guided = (backbone.rollout_images(PROMPTS, SEEDS[:2], s).final for s in (PLAIN, GUIDED))
    other = backbone.rollout_images(["yes", "no"], SEEDS[:2], PLAIN).final
    assert (plain - guided).abs().max() > 1e-3
    assert (plain - other).abs().max() > 1e-3


def test_decoding_gives_pixels(backbone):
    drawn = backbone.rollout_images(PROMPTS, SEEDS[:2], PLAIN)
    images = backbone.decode(drawn)
    assert images.shape == (2, *backbone.image_size, 3)
    # Token (1, 2) of 2 x 3 is the last 16 x 16 pixels.
    drawn.final[0, 5] += 1
    changed = (backbone.decode(drawn)[0].astype(int) - images[0]).__abs__().sum(-1)
    assert changed[16:, 32:].mean() > 2 * changed[:16, :32].mean()


def passes(backbone, monkeypatch, call):
    """Rows and generation tokens of every pass of the model that a call makes."""
    made, forward = [], backbone.model.forward

    def counted(packed, context):
        made.append((len(packed.segments), len(packed.latents)))
        return forward(packed, context)

    with monkeypatch.context() as patch:
        patch.setattr(backbone.model, "forward", counted)
        call()
    return made


def test_passes_do_not_depend_on_the_data(backbone, monkeypatch):
    """As ranks of ZeRO-3 need it; a prompt that repeats is read once."""
    sampling = replace(WINDOW, shift=1.0, guidance_above=0.6, sde_before=0)
    early, late = (next(s for s in range(99) if sampling.window_start(s) == start) for start in (0, 5))
    for prompts, seed, guided in ((["yes"] * 2, early, 6), (["yes", "no"], late, 1)):
        drawn = backbone.rollout_images(prompts, [seed] * 2, sampling)
        made = passes(backbone, monkeypatch, lambda p=prompts, d=drawn: backbone.image_dist(p, d, sampling))
        assert made == [(len(set(prompts)), 0), (6, 36), (guided, 6 * guided)]
        for hidden in ([False] * 2, [True] * 2):
            made = passes(
                backbone, monkeypatch, lambda p=prompts, d=drawn, h=hidden: backbone.cell_losses(p, d, [1, 2], 1.0, h)
            )
            assert made == [(len(set(prompts)), 0), (2, 12)]


# ---- the images' own loss -----------------------------------------------------------------------------------------


def test_cell_losses_are_squared_errors_of_the_velocity(backbone):
    drawn = backbone.rollout_images(PROMPTS, SEEDS, PLAIN)
    losses = backbone.cell_losses(IMAGE_PROMPTS, drawn, SEEDS, 4.0)
    assert losses.shape == (6, 6)
    generator = torch.Generator().manual_seed(SEEDS[4])
    time = flow.shifted(torch.randn(1, generator=generator).sigmoid(), 4.0)
    noise = torch.randn(1, 6, 16, generator=generator)
    x = (1 - time) * drawn.final[4:5] + time * noise
    context = backbone._contexts(PROMPTS[1:], None)
    velocity = backbone.painter.velocity(backbone.painter.layout.tiled(context.next_position), context, x, time)
    expected = (velocity - (noise - drawn.final[4:5])).pow(2).mean(-1)
    assert (losses[4] - expected).abs().max() < 1e-4
    alone = backbone.cell_losses(PROMPTS[1:], rows_of(drawn, [4]), SEEDS[4:5], 4.0)
    assert (alone - losses[4]).abs().max() < 1e-4


def test_hidden_prompts_are_those_of_the_unconditional_branch(backbone):
    drawn = backbone.rollout_images(PROMPTS, SEEDS[:2], PLAIN)
    losses = backbone.cell_losses(PROMPTS, drawn, [1, 2])
    hidden = backbone.cell_losses(PROMPTS, drawn, [1, 2], dropped=[False, True])
    empty = backbone.painter.cell_errors(Context.empty(2), drawn.final, [1, 2], 1.0)
    assert torch.allclose(hidden, torch.stack([losses[0], empty[1]]), atol=1e-5)
    assert (losses[1] - empty[1]).abs().max() > 1e-3
    assert torch.allclose(backbone.cell_losses(PROMPTS, drawn, [1, 2], dropped=[True] * 2), empty, atol=1e-5)


# ---- plans --------------------------------------------------------------------------------------------------------


def test_images_are_drawn_from_prompt_and_plan(backbone):
    plans = ["a blue square", "two rings"]
    drawn = backbone.rollout_images(["yes"], SEEDS[:2], PLAIN, plans)
    without = backbone.rollout_images(["yes"], SEEDS[:2], PLAIN)
    assert (drawn.final - without.final).abs().max() > 1e-3
    step = backbone.image_dist(["yes"] * 2, drawn, PLAIN, plans=plans)
    assert (step.log_prob(drawn.taken) - drawn.log_probs).abs().max() < 1e-6
    swapped = backbone.image_dist(["yes"] * 2, drawn, PLAIN, plans=plans[::-1])
    assert (swapped.mean - step.mean).abs().max() > 1e-3
    with_plan = backbone.cell_losses(["yes"] * 2, drawn, [1, 2], plans=plans)
    assert (with_plan - backbone.cell_losses(["yes"] * 2, drawn, [1, 2])).abs().max() > 1e-3
    with pytest.raises(BackboneError, match="1 plans for 2 images"):
        backbone.rollout_images(["yes"], SEEDS[:2], PLAIN, plans[:1])


def test_plans_are_written_behind_the_instruction(backbone, monkeypatch):
    inputs = backbone.inputs
    seen = []
    monkeypatch.setattr(backbone, "_read", seen.extend)
    monkeypatch.setattr(backbone, "_write", lambda *_: written)
    written = type("Written", (), {"texts": ["<|im_<|im_end|>end|>good <|im_start|>plan"]})
    assert backbone.write_plans(["yes"], [1], 4, 0.0) == ["good plan"]
    assert seen == [[inputs.whole("Plan it first."), inputs.whole("yes")]]


def test_plans_belong_to_their_seeds(backbone):
    plans = backbone.write_plans([*PROMPTS, PROMPTS[0]], [1, 2, 3], 8, 1.0)
    assert plans[1] == backbone.write_plans(PROMPTS[1:], [2], 8, 1.0)[0]
    assert plans[0] != plans[2]
    for plan in plans:
        check_text(plan, backbone.inputs.control)


# ---- text ---------------------------------------------------------------------------------------------------------


def written(backbone, seeds, temperature, special, rows=(0, 1, 2, 3)):
    """`sample_text`, whose ids a random model's text does not give back."""
    context = backbone._read(backbone.inputs.reading([IMAGES[r] for r in rows], [QUESTIONS[r] for r in rows]))
    return sample_text(backbone.model, special, context, seeds, 12, temperature, backbone.device)


def early_end(backbone, temperature):
    """Special tokens with another end, which the second answer has as its fourth token at the latest."""
    special = backbone.inputs.special
    ids = written(backbone, [1, 2, 3, 4], temperature, special)[0]
    return replace(special, text_end=int(ids[1, 3]))


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_writing_equals_teacher_forcing(backbone, temperature):
    special = early_end(backbone, temperature)
    ids, log_probs, entropies, mask = written(backbone, [1, 2, 3, 4], temperature, special)
    lengths = mask.sum(1).int().tolist()
    assert len(set(lengths)) > 1
    assert ids[1, lengths[1] - 1] == special.text_end
    answers = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    context = backbone._read(backbone.inputs.reading(IMAGES, QUESTIONS))
    score = score_text(backbone.model, special, context, answers, backbone.device)
    assert torch.equal(score.mask, mask)
    assert torch.equal(score.ids, ids)
    assert (score.log_probs - log_probs).abs().max() < 1e-4
    assert ((entropies > 0) == mask.bool()).all()
    assert entropies.max() < 0.8 * np.log(len(backbone.tokenizer))  # far from uniform
    if temperature == 0:
        assert torch.equal(ids, written(backbone, [9, 9, 9, 9], 0.0, special)[0])
        assert (log_probs[mask.bool()] > -np.log(len(backbone.tokenizer))).all()


def test_an_answer_depends_on_its_own_seed_only(backbone):
    special = early_end(backbone, 1.0)
    ids, _, _, mask = written(backbone, [1, 2, 3, 4], 1.0, special)
    for row in range(4):
        alone, _, _, alone_mask = written(backbone, [row + 1], 1.0, special, [row])
        assert torch.equal(alone[0], ids[row, : alone.shape[1]])
        assert alone_mask.sum() == mask[row].sum()
    assert not torch.equal(written(backbone, [5, 6, 7, 8], 1.0, special)[0][:, :1], ids[:, :1])


def test_answers_are_scored_alone_as_in_a_batch(backbone):
    responses = ["two rings", "yes", "", "a blue square"]
    together = backbone.text_logps(IMAGES, QUESTIONS, responses)
    assert together.log_probs.shape == together.mask.shape == together.ids.shape
    assert together.mask.sum(1).tolist() == [len(backbone.inputs.ids(text)) for text in responses]
    for row in (0, 1, 3):
        alone = backbone.text_logps(IMAGES[row : row + 1], QUESTIONS[row : row + 1], responses[row : row + 1])
        length = alone.ids.shape[1]
        assert torch.equal(together.ids[row, :length], alone.ids[0])
        assert (together.log_probs[row, :length] - alone.log_probs[0]).abs().max() < 1e-5
    assert not together.log_probs[together.mask == 0].any()
    empty = backbone.text_logps([None], ["yes"], [""])
    assert empty.mask.tolist() == [[0.0]]
    assert empty.log_probs.tolist() == [[0.0]]


def test_the_end_of_an_answer_is_scored_on_request(backbone):
    plain = backbone.text_logps(IMAGES[:1], QUESTIONS[:1], ["two rings"])
    ended = backbone.text_logps(IMAGES[:1], QUESTIONS[:1], ["two rings"], end_of_turn=True)
    assert torch.allclose(ended.log_probs[:, :-1], plain.log_probs, atol=1e-5)
    assert ended.ids[0].tolist() == [*plain.ids[0].tolist(), backbone.inputs.special.text_end]


def test_log_probabilities_are_those_of_the_public_format(backbone):
    """One row spelt out: picture, question between its boundaries, start, answer."""
    inputs, special = backbone.inputs, backbone.inputs.special
    question, answer = inputs.ids(QUESTIONS[0]), inputs.ids("two rings")
    row = [inputs.picture(IMAGES[0]), Text([special.text_start, *question, special.text_end])]
    row.append(Text([special.text_start, *answer]))
    hidden, _ = backbone.model(pack([row], backbone.model.config, special), Context.empty(1))
    logits = backbone.model.logits(hidden.understanding[-len(answer) - 1 : -1]).log_softmax(-1)
    expected = logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
    score = backbone.text_logps(IMAGES[:1], QUESTIONS[:1], ["two rings"])
    assert (score.log_probs[0] - expected).abs().max() < 1e-5
    assert score.mean_log_prob().item() == pytest.approx(expected.mean().item(), abs=1e-5)


def test_rollout_text_gives_texts_and_heeds_the_system(backbone):
    plain = backbone.rollout_text(IMAGES, QUESTIONS, [1, 2, 3, 4], 6, 0.0)
    assert len(plain.texts) == 4
    assert plain.ids.shape == plain.mask.shape == plain.entropies.shape
    assert plain.texts == backbone.inputs.texts(plain.ids)
    system = backbone.rollout_text(IMAGES, QUESTIONS, [1, 2, 3, 4], 6, 0.0, system="Plan it first.")
    assert (system.log_probs[:, 0] - plain.log_probs[:, 0]).abs().max() > 1e-3


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda b: b.rollout_images(PROMPTS, [1, 2, 3], PLAIN), "3 seeds do not divide evenly over 2 prompts"),
        (lambda b: b.rollout_images([], [], PLAIN), "0 seeds"),
        (lambda b: b.rollout_images(["a <|im_end|>"], [1], PLAIN), "control token '<|im_end|>'"),
        (lambda b: b.rollout_text([None], ["<|vision_start|>"], [1], 1, 1.0), "control token"),
        (lambda b: b.rollout_text([None], ["yes"], [1], 1, 1.0, "<|endoftext|>"), "control token"),
        (lambda b: b.rollout_text([None], ["yes"], [1, 2], 1, 1.0), "2 seeds for 1 texts"),
        (lambda b: b.rollout_text([None], ["yes"], [1], 0, 1.0), "max_new_tokens 0"),
        (lambda b: b.rollout_text([None], ["yes"], [1], 1, -1.0), "temperature -1.0"),
        (lambda b: b.text_logps([None, None], ["yes"], ["no"]), "2 images but 1 questions"),
        (lambda b: b.text_logps([None], ["yes"], ["no", "no"]), "2 responses to 1 questions"),
        (lambda b: b.text_logps([np.zeros((3, 3))], ["yes"], ["no"]), "image 0 must be a uint8"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(backbone, call, said):
    with pytest.raises(BackboneError, match=said.replace("|", r"\|")):
        call(backbone)


def test_latents_of_another_size_are_refused(backbone):
    drawn = backbone.rollout_images(PROMPTS, SEEDS[:2], PLAIN)
    cut = FlowTraj(drawn.latents[:, :, :4], drawn.steps, drawn.log_probs, drawn.final[:, :4])
    for call in (lambda: backbone.image_dist(PROMPTS, cut, PLAIN), lambda: backbone.cell_losses(PROMPTS, cut, [1, 2])):
        with pytest.raises(BackboneError, match=r"latents of shape \[2, 4, 16\] do not fit 2 prompts"):
            call()
    with pytest.raises(BackboneError, match="1 seeds for 2 images"):
        backbone.cell_losses(PROMPTS, drawn, [1])
