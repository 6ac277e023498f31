"""Which prompts an iteration draws: a pure function of seed and iteration, without repeats."""

import pytest

from unified_rl.config import ConfigError
from unified_rl.records import PromptRecord
from unified_rl.rollout.groups import iteration_prompts

PROMPTS = [PromptRecord(f"p{i:02d}", f"text {i}") for i in range(10)]


def ids(count, seed, iteration, prompts=PROMPTS):
    return [p.prompt_id for p in iteration_prompts(prompts, count, seed, iteration)]


def test_an_epoch_draws_every_prompt_at_most_once():
    first, second, third = (ids(3, 0, k) for k in range(3))
    assert len(set(first + second + third)) == 9
    assert ids(3, 0, 3) != first  # the next epoch has its own order


def test_an_iteration_never_repeats_a_prompt():
    for iteration in range(30):
        drawn = ids(4, 1, iteration)
        assert len(set(drawn)) == 4


def test_the_order_of_the_shards_does_not_matter_and_the_seed_does():
    assert ids(5, 0, 7, PROMPTS[::-1]) == ids(5, 0, 7)
    assert ids(5, 0, 7) != ids(5, 1, 7)


def test_too_few_prompts_are_refused():
    with pytest.raises(ConfigError, match="only 10 prompts"):
        ids(11, 0, 0)
