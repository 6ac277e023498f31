"""The updates of Proposer and Solver on a scripted reading path, against numbers computed by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from unified_rl.config import RunConfig
from unified_rl.policy.controllers import KlController, RunningMean
from unified_rl.train.text_losses import ProposerUpdate, RoleState, SolverUpdate, TextUpdate
from unified_rl.train.texts import TextData, TextSample

IMAGE = np.zeros((2, 2, 3), np.uint8)
# Padding holds numbers that must not matter.
LOG_PROBS = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, 7.0, 7.0]])
KL = torch.tensor([[0.3, 0.6, 0.9], [0.2, 9.0, 9.0]])
ENTROPY = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
STATE = RoleState(KlController(coefficient=0.5), RunningMean(0.25))


def text(key: str, length: int, **changes: object) -> TextSample:
    plain = TextSample(key, IMAGE, f"question {key}", torch.arange(1, length + 1), LOG_PROBS[0, :length], 0.75, 0.75)
    return replace(plain, **changes)


SAMPLES = [
    text("a", 3, advantage=1.5),
    text("b", 1, old_log_probs=torch.tensor([-1.5]), reward=0.0, used_reward=0.0, advantage=-1.0),
]


class Engine:
    """Answers with given numbers and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked = []

    def __call__(self, *arguments: object) -> object:
        self.asked.append(arguments)
        return LOG_PROBS.clone().requires_grad_(), KL, ENTROPY


def update_of(kind: type[TextUpdate]) -> TextUpdate:
    old = [s.old_log_probs for s in SAMPLES]
    return kind(Engine(), TextData(SAMPLES, [[0, 1]]), RunConfig(), torch.device("cpu"), STATE, old)


def test_proposer_is_clipped_towards_the_policy_that_wrote():
    update = update_of(ProposerUpdate)
    loss, values = update([0, 1], 0)
    # The first replies as before; the second one's token is e times likelier than when it was written.
    assert loss.tolist() == pytest.approx([-1.5 + 0.5 * 0.6, math.e + 0.5 * 0.2])
    assert values["kl"].tolist() == pytest.approx([0.6, 0.2])
    assert values["ratio_max_deviation"].tolist() == pytest.approx([0.0, math.e - 1])
    assert values["entropy"].tolist() == [2.0, 4.0] and values["log_prob"].tolist() == pytest.approx([-2.0, -0.5])
    images, questions, ids, mask, temperature = update.engine.asked[0]
    assert ids.tolist() == [[1, 2, 3], [1, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert questions == ["question a", "question b"] and images[0] is IMAGE
    assert temperature == RunConfig().self_consistency.proposer_temperature


def test_solver_learns_from_rewards_above_the_running_mean():
    update = update_of(SolverUpdate)
    loss, values = update([0, 1], 0)
    # advantages .75 - .25 and 0 - .25, on mean log-probs -2 and -.5
    assert loss.tolist() == pytest.approx([0.5 * 2.0 + 0.5 * 0.6, -0.25 * 0.5 + 0.5 * 0.2])
    assert values["policy_loss"].tolist() == pytest.approx([1.0, -0.125])
    assert update.engine.asked[0][4] == RunConfig().self_consistency.solver_temperature
    loss[1].backward()


def test_baseline_and_coefficient_move_once_a_step_and_are_stored():
    update = update_of(SolverUpdate)
    used = update.after_step([0, 1], kl=0.04)  # twice the target
    assert used == pytest.approx({"kl_coefficient": 0.5, "baseline": 0.25, "advantage/abs_mean": 0.375})
    assert update.state.baseline.value == pytest.approx(0.6 * 0.25 + 0.4 * 0.375)
    assert update.state.controller.coefficient == pytest.approx(0.5 * math.exp(0.1))
    assert RoleState.of(RunConfig(), update.state.to_dict(), 9.0) == update.state
    proposer = update_of(ProposerUpdate)
    assert proposer.after_step([0, 1], kl=0.02) == {"kl_coefficient": 0.5}
    assert proposer.state == STATE  # at the target, and without a baseline


def test_state_begins_as_configured():
    config = RunConfig()
    config.self_consistency.kl_target, config.self_consistency.kl_rate = 0.5, 0.25
    state = RoleState.of(config, None, 0.25)
    assert (state.controller.target, state.controller.rate, state.baseline.value) == (0.5, 0.25, 0.25)
    with pytest.raises(ValueError, match="missing or unknown entry"):
        RoleState.of(config, {"controller": {}, "baseline": {}}, 0.0)
