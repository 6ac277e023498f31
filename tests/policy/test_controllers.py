import json
import math

import pytest

from unified_rl.policy.controllers import KlController, RunningMean


def test_a_running_mean_by_hand():
    mean = RunningMean(0.5, momentum=0.6).updated([1.0, 2.0])
    assert mean.value == pytest.approx(0.6 * 0.5 + 0.4 * 1.5)
    assert mean.updated([0.0]).value == pytest.approx(0.6 * 0.9)


def test_what_training_starts_from():
    assert RunningMean().to_dict() == {"value": 0.0, "momentum": 0.6, "low": None, "high": None}
    assert KlController().to_dict() == {"coefficient": 0.01, "target": 0.02, "rate": 0.1, "low": 1e-3, "high": 1e2}


def test_a_running_mean_stays_within_its_bounds():
    easy = RunningMean(-0.05, high=-0.05)
    assert easy.updated([1.0]).value == -0.05
    assert easy.updated([-1.05]).value == pytest.approx(0.6 * -0.05 + 0.4 * -1.05)
    assert RunningMean(0.9, momentum=0.0, low=0.4, high=1.5).updated([0.0]).value == 0.4


def test_without_values_nothing_changes():
    mean = RunningMean(0.3)
    assert mean.updated([]) == mean


def test_the_order_of_values_does_not_matter():
    values = [0.1, 1e16, 0.2, -1e16, 0.3]
    assert RunningMean().updated(values) == RunningMean().updated(sorted(values))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        RunningMean().updated([0.0, bad])
    with pytest.raises(ValueError, match="finite"):
        KlController().updated(bad)


@pytest.mark.parametrize(
    "state", [{"momentum": 1.0}, {"momentum": -0.1}, {"value": math.nan}, {"value": 2.0, "high": 1}]
)
def test_an_impossible_mean_is_refused(state):
    with pytest.raises(ValueError, match="must lie|is not a number"):
        RunningMean(**state)


def test_the_coefficient_does_not_move_at_the_target():
    for coefficient in (1e-3, 0.01, 3.7, 100.0):
        assert KlController(coefficient).updated(0.02).coefficient == coefficient


def test_the_coefficient_by_hand():
    assert KlController().updated(0.04).coefficient == pytest.approx(0.01 * math.exp(0.1))
    assert KlController().updated(0.0).coefficient == pytest.approx(0.01 * math.exp(-0.1))
    assert KlController(target=0.1, rate=1.0).updated(0.25).coefficient == pytest.approx(0.01 * math.exp(1.5))


def test_the_coefficient_stays_within_its_bounds():
    assert KlController().updated(1e300).coefficient == 1e2
    low = KlController()
    for _ in range(100):
        low = low.updated(0.0)
    assert low.coefficient == 1e-3


def test_one_update_changes_the_coefficient_by_a_bounded_factor():
    wide = KlController(1.0, low=1e-300, high=1e300)
    assert wide.updated(1e9).coefficient == pytest.approx(math.exp(50.0))
    assert wide.updated(-1e9).coefficient == pytest.approx(math.exp(-50.0))


def test_steering_reaches_the_target():
    """A divergence that falls with the coefficient, as in training: the loop settles where it is the target."""
    controller = KlController()
    for _ in range(500):
        controller = controller.updated(0.002 / controller.coefficient)
    assert 0.002 / controller.coefficient == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize(
    "state", [{"coefficient": 0.0}, {"coefficient": 200.0}, {"low": 0.0}, {"target": 0.0}, {"rate": -1.0}]
)
def test_an_impossible_controller_is_refused(state):
    with pytest.raises(ValueError, match="must lie|must be above"):
        KlController(**state)


@pytest.mark.parametrize("state", [RunningMean(0.25, 0.9, low=0.1), KlController().updated(0.07)])
def test_a_state_survives_its_file(state):
    text = json.dumps(state.to_dict(), allow_nan=False)
    assert type(state).from_dict(json.loads(text)) == state


def test_a_stored_state_must_be_whole():
    state = KlController().to_dict()
    with pytest.raises(ValueError, match="KlController with a missing or unknown entry: coefficient"):
        KlController.from_dict({k: v for k, v in state.items() if k != "coefficient"})
    with pytest.raises(ValueError, match="beta"):
        KlController.from_dict({**state, "beta": 1.0})
