import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_rl.train.batching import global_batches, micro_batches, micro_batches_per_rank, permuted


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 9))
def test_ranks_do_equal_work_and_cover_every_sample_once(n, world_size, micro_batch):
    samples = [7 * i for i in range(n)]
    shares = [micro_batches(samples, rank, world_size, micro_batch) for rank in range(world_size)]
    assert {len(share) for share in shares} == {micro_batches_per_rank(n, world_size, micro_batch)}
    assert all(len(m.samples) == len(m.weights) == micro_batch for share in shares for m in share)
    live = [s for share in shares for m in share for s, w in zip(m.samples, m.weights, strict=True) if w == 1.0]
    assert sorted(live) == samples
    places = len(shares[0]) * world_size * micro_batch
    assert places - n < world_size * micro_batch  # no forward that consists of padding on every rank


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 2**62))
def test_steps_partition_the_groups_nearly_equally(n, groups_per_step, seed):
    groups = [3 * i for i in range(n)]
    steps = global_batches(groups, groups_per_step, [seed])
    assert len(steps) == max(1, round(n / groups_per_step))
    assert sorted(g for step in steps for g in step) == groups
    assert max(map(len, steps)) - min(map(len, steps)) <= 1


def test_each_epoch_has_its_own_order_and_all_groups():
    steps = global_batches(range(12), 4, [1, 2])
    first, second = sum(steps[:3], []), sum(steps[3:], [])
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert steps == global_batches(range(12), 4, [1, 2])


def test_permutation_is_fixed_by_its_seed():
    assert permuted(6, 5) == permuted(6, 5) and sorted(permuted(6, 5)) == list(range(6))
    assert len({tuple(permuted(6, seed)) for seed in range(20)}) > 10


def test_no_groups_no_steps():
    assert global_batches([], 4, [1]) == []
    with pytest.raises(ValueError, match="at least one sample"):
        micro_batches([], 0, 1, 1)
