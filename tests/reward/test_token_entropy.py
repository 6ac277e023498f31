import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_rl.backbones.base import Categorical
from unified_rl.reward.answers import answer_tokens
from unified_rl.reward.skips import SkipReason
from unified_rl.reward.token_entropy import (
    ENTROPY_RULES,
    EntropyRules,
    EntropyWindow,
    rank_and_push,
    token_entropy,
)

RELEASE = ENTROPY_RULES["self_consistency_release"]


def test_uniform_logits_give_the_log_of_the_vocabulary_and_certainty_gives_zero():
    uniform = Categorical(torch.zeros(1, 3, 50)).entropy()[0]
    assert token_entropy(uniform, torch.ones(3)) == pytest.approx(math.log(50), rel=1e-6)
    certain = torch.full((1, 3, 50), -1e4)
    certain[..., 7] = 1e4
    assert token_entropy(Categorical(certain).entropy()[0], torch.ones(3)) == 0.0


def test_the_first_tokens_inside_the_answer_count():
    entropies = torch.tensor([9.0, 8.0, 0.1, 0.4, 0.2, 0.0, 0.3, 7.0, 5.0, 5.0])
    mask = torch.tensor([1.0] * 8 + [0.0] * 2)
    inside = [False, False, True, True, True, True, True, True]
    assert token_entropy(entropies, mask, inside) == pytest.approx(0.4)  # the sixth of the answer is left out
    assert token_entropy(entropies, mask, inside, EntropyRules(reduce="mean")) == pytest.approx(0.2)
    assert token_entropy(entropies, mask, inside, EntropyRules(first_tokens=9)) == 7.0
    assert token_entropy(entropies, mask, inside, EntropyRules(first_tokens=1)) == pytest.approx(0.1)
    assert token_entropy(entropies, mask, rules=RELEASE) == 9.0  # the release measures its own tag


def test_the_tokens_of_a_tagged_answer():
    inside = answer_tokens(["<answer>", "dark", " green", "</answer>", ""])
    assert token_entropy(torch.tensor([3.0, 0.5, 0.7, 2.0, 1.0]), torch.ones(5), inside) == pytest.approx(0.7)


def test_what_cannot_be_measured_is_skipped():
    assert token_entropy(torch.ones(2), torch.zeros(2)).reason is SkipReason.NO_ANSWER_TOKENS
    assert token_entropy(torch.ones(2), torch.ones(2), [False, False]).reason is SkipReason.NO_ANSWER_TOKENS
    assert token_entropy(torch.tensor([math.nan, 1.0]), torch.ones(2)).reason is SkipReason.BAD_ENTROPY
    assert token_entropy(torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 1.0])) == 1.0
    with pytest.raises(ValueError, match="3 marks for a reply of 2 tokens"):
        token_entropy(torch.ones(3), torch.tensor([1.0, 1.0, 0.0]), [True] * 3)


def test_rank_by_hand():
    window = EntropyWindow(tuple(i / 10 for i in range(8)))
    assert [window.rank(e) for e in (-1.0, 0.0, 0.05, 0.1, 0.35, 0.7, 9.0)] == [0, 0, 1 / 8, 1 / 8, 4 / 8, 7 / 8, 1]


def test_rank_without_a_history_is_a_fixed_curve():
    window = EntropyWindow((0.1,) * 7)
    assert window.rank(2.0) == 0.5
    assert window.rank(3.0) == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert window.rank(0.0) == pytest.approx(1 / (1 + math.exp(3.0)))
    assert window.pushed([0.1]).rank(2.0) == 1.0


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 5), max_size=20), st.floats(0, 5), st.floats(0, 5))
def test_rank_never_falls_with_the_entropy(values, first, second):
    window = EntropyWindow(tuple(values))
    assert 0 <= window.rank(min(first, second)) <= window.rank(max(first, second)) <= 1


def test_the_oldest_leave():
    assert EntropyWindow().to_dict() == {"values": (), "size": 128, "warm": 8}
    window = EntropyWindow(size=8).pushed([1.0] * 5).pushed([2.0] * 5)
    assert window.values == (1.0,) * 3 + (2.0,) * 5
    assert window.pushed([3.0] * 20).values == (3.0,) * 8
    assert window.pushed([]) == window


def test_neither_order_nor_ranks_matter():
    values = [random.Random(i).random() for i in range(50)]
    window = EntropyWindow(tuple(values[:20]), size=32)
    mixed = values[20:]
    random.Random(0).shuffle(mixed)
    assert window.pushed(mixed) == window.pushed(values[20:])
    ranks, after = rank_and_push(window, values[20:])
    shuffled, same = rank_and_push(window, mixed)
    assert sorted(ranks) == sorted(shuffled) and after == same
    assert dict(zip(values[20:], ranks, strict=True)) == dict(zip(mixed, shuffled, strict=True))


def test_a_step_that_is_cut_leaves_low_and_high_values():
    window = EntropyWindow(size=100).pushed([float(i) for i in range(400)])
    assert len(window.values) == 100
    for quarter in range(4):
        assert 22 <= sum(100 * quarter <= v < 100 * (quarter + 1) for v in window.values) <= 28
    oldest_half_gone = EntropyWindow(size=100).pushed([float(i) for i in range(100)]).pushed([1000.0] * 50)
    assert 22 <= sum(v < 50 for v in oldest_half_gone.values) <= 28


def test_ours_ranks_before_it_pushes_and_the_release_after():
    window = EntropyWindow(tuple(float(i) for i in range(8)))
    ranks, after = rank_and_push(window, [9.0, 0.0])
    assert ranks == [1.0, 0.0] and sorted(after.values) == [0, 0, 1, 2, 3, 4, 5, 6, 7, 9]
    ranks, after = rank_and_push(window, [9.0, 0.0], RELEASE)
    assert ranks == [8 / 9, 0.0] and sorted(after.values) == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    cold, _ = rank_and_push(EntropyWindow(), [0.0], RELEASE)
    assert cold == [0.0]


def test_a_stored_window_goes_on_as_if_it_had_not_stopped():
    window = EntropyWindow(size=16, warm=4).pushed([0.3, 0.1, 0.2])
    read = EntropyWindow.from_dict(json.loads(json.dumps(window.to_dict(), allow_nan=False)))
    assert read == window
    assert read.pushed([0.5, 0.4]) == window.pushed([0.5, 0.4])


@pytest.mark.parametrize(
    "state", [{"values": (1.0, 2.0), "size": 1, "warm": 1}, {"warm": 0}, {"size": 4}, {"values": (math.nan,)}]
)
def test_an_impossible_window_is_refused(state):
    with pytest.raises(ValueError, match="does not fit|not a finite"):
        EntropyWindow(**state)


def test_impossible_rules_are_refused():
    for rules in ({"reduce": "median"}, {"first_tokens": 0}):
        with pytest.raises(ValueError, match="reduce must be one of max, mean"):
            EntropyRules(**rules)
    with pytest.raises(ValueError, match="not a finite"):
        EntropyWindow().pushed([math.inf])
