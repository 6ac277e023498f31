"""The two updates on a scripted drawing path, against numbers computed by hand."""

import math
from dataclasses import replace

import pytest
import torch

from unified_rl.config import RunConfig, resolve
from unified_rl.train.losses import GrpoUpdate, RewardWeightedUpdate
from unified_rl.train.samples import IterationData, Sample
from unified_rl.train.zero3 import TrainError

CPU = torch.device("cpu")
CELLS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, 0.5, 0.5, 0.5]])


def sample(number: int, **changes: object) -> Sample:
    tensors = {"final": torch.full((4, 2), float(number)), "latents": torch.zeros(4, 4, 2)}
    tensors |= {"steps": torch.tensor([2, 3, 4]), "log_probs": torch.tensor([-1.0, -2.0, -3.0])}
    reference = torch.zeros(3, 4, 2)
    plain = Sample(f"p_{number:02d}", f"prompt {number}", tensors, None, reference, 0.5, 0.5)
    return replace(plain, **changes)


def data_of(*samples: Sample) -> IterationData:
    return IterationData(list(samples), [list(range(len(samples)))], {}, 0, 0)


def config_with(*overrides: str) -> RunConfig:
    return resolve("gvu_janus_shapes", ["backbone.family=janus", *overrides])


class Engine:
    """Answers with given numbers and keeps what it was asked."""

    def __init__(self, answer: object) -> None:
        self.answer, self.asked = answer, []

    def __call__(self, work: str, *arguments: object) -> object:
        self.asked.append((work, *arguments))
        return self.answer


def weighted(samples: list[Sample], *overrides: str, number: int = 0) -> tuple[torch.Tensor, dict, Engine]:
    engine = Engine(CELLS[: len(samples)].clone().requires_grad_())
    config = config_with("policy.objective=reward_weighted", *overrides)
    update = RewardWeightedUpdate(engine, data_of(*samples), config, CPU)
    return *update(range(len(samples)), number), engine


def test_every_cell_weighs_its_reward_plus_the_reference():
    maps = torch.tensor([1.0, 0.0, -0.5, -1.0]), torch.tensor([0.2, 0.2, 0.2, 0.2])
    loss, values, _ = weighted([sample(i, weights=m) for i, m in enumerate(maps)])
    # weights 1.5, .5, 0, 0 (floored) and .7
    assert loss.tolist() == pytest.approx([(1.5 * 1 + 0.5 * 2) / 4, 0.7 * 0.5])
    assert values["negative_fraction"].tolist() == [0.25, 0.0] and values["weight_max"].tolist() == pytest.approx(
        [1.5, 0.7]
    )


def test_one_reward_an_image_becomes_a_flat_map_of_its_advantage():
    samples = [sample(0, advantage=1.0), sample(1, advantage=-9.0)]
    loss, values, _ = weighted(samples, "policy.advantage_limit=2", "policy.min_weight=-.inf")
    assert values["weight_mean"].tolist() == pytest.approx([1.0, -0.5])  # 1 / 2 + .5, and -1 + .5 at the limit
    assert loss.tolist() == pytest.approx([2.5, -0.25])


def test_constant_control_is_plain_training_on_the_own_images():
    maps = torch.tensor([1.0, 0.0, -0.5, -1.0])
    loss, _, _ = weighted([sample(0, weights=maps)], "policy.control=constant", "policy.reference_weight=0.3")
    assert loss.tolist() == pytest.approx([2.5])


def test_noise_belongs_to_sample_and_step_and_prompts_are_hidden_at_their_rate():
    samples = [sample(i, weights=torch.zeros(4)) for i in range(2)]
    seeds = []
    for number in (0, 1, 1):
        _, _, engine = weighted(samples, "policy.flow_shift=3", number=number)
        work, prompts, trajectory, drawn, shift, hidden = engine.asked[0]
        assert (work, prompts, shift, hidden) == ("cell_losses", ["prompt 0", "prompt 1"], 3.0, [False, False])
        assert trajectory.final[1].eq(1).all()
        seeds.append(drawn)
    assert seeds[1] == seeds[2] and len({*seeds[0], *seeds[1]}) == 4
    shares = [weighted(samples, "policy.hidden_prompts=0.5", number=n)[2].asked[0][-1] for n in range(200)]
    assert 0.4 < sum(map(sum, shares)) / 400 < 0.6


def test_a_map_of_another_grid_is_refused():
    with pytest.raises(TrainError, match="p_00: its reward map has 9 cells, the image 4"):
        weighted([sample(0, weights=torch.zeros(9))])


def grpo(log_probs: torch.Tensor, number: int = 0, *overrides: str) -> tuple[torch.Tensor, dict, Engine]:
    samples = [sample(0, advantage=1.0), sample(1, advantage=-1.0)]
    engine = Engine((log_probs, torch.full_like(log_probs, 0.1), torch.ones_like(log_probs)))
    old = [s.tensors["log_probs"] for s in samples]
    update = GrpoUpdate(engine, data_of(*samples), config_with("policy.kl_coefficient=0.5", *overrides), CPU, None, old)
    return *update([0, 1], number), engine


def test_grpo_before_the_first_update():
    loss, values, engine = grpo(torch.tensor([[-1.0, -2.0, -3.0]] * 2))
    assert loss.tolist() == pytest.approx([-1 + 0.05, 1 + 0.05])
    assert values["ratio_max_deviation"].tolist() == [0, 0] and values["entropy"].tolist() == [1, 1]
    work, _, trajectory, _, steps, plans, reference = engine.asked[0]
    assert (work, steps, plans) == ("decisions", None, None)
    assert trajectory.steps.tolist() == [[2, 3, 4]] * 2 and reference.shape == (2, 3, 4, 2)


def test_a_part_of_the_steps_is_chosen_anew_in_every_update_and_alike_for_all_samples():
    chosen = set()
    for number in range(12):
        old = torch.tensor([-1.0, -2.0, -3.0])
        first, _, engine = grpo(torch.zeros(2, 2), number, "policy.steps_per_update=2")
        steps = engine.asked[0][4]
        assert engine.asked[0][6].shape == (2, 2, 4, 2)
        chosen.add(tuple(steps))
        loss, _, _ = grpo(old[steps].expand(2, 2), number, "policy.steps_per_update=2")
        assert loss.tolist() == pytest.approx([-1 + 0.05, 1 + 0.05])  # old log-probs of the same steps
        assert not math.isclose(float(first[1]), float(loss[1]))
    assert chosen == {(0, 1), (0, 2), (1, 2)}
