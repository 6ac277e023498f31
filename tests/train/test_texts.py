import numpy as np
import pytest
import torch

from unified_rl.config import RunConfig
from unified_rl.inquiries import InquiryRecord, InquiryReward
from unified_rl.train.texts import proposer_data, solver_data

TASK = "ask a medium question"


def inquiry(image_id: str, lengths=(2, 3, 1)) -> InquiryRecord:
    """Three questions on one image with two answers each; every token id says where it is from."""
    ids = 10 * torch.arange(3)[:, None] + torch.arange(4)
    answers = 100 + 20 * torch.arange(3)[:, None, None] + 10 * torch.arange(2)[:, None] + torch.arange(4)
    tensors = {
        "proposer_ids": ids, "proposer_log_probs": -0.1 * ids, "proposer_lengths": torch.tensor(lengths),
        "answer_ids": answers, "answer_log_probs": -0.01 * answers, "answer_lengths": torch.tensor([[1, 2]] * 3),
    }  # fmt: skip
    questions = [{"task": TASK, "question": f"what is {k}?"} for k in range(3)]
    return InquiryRecord(image_id, 1, "base", {}, np.full((2, 2, 3), int(image_id[1:]), np.uint8), questions, tensors)


def scored(image_id: str, proposer, chosen=1, solver=(0.5, -0.5), status="ok") -> InquiryReward:
    questions = [{"reward": value} for value in proposer]
    return InquiryReward(image_id, "base", status, "", questions, chosen, "", list(solver) if chosen >= 0 else [])


def config_with(control: str = "none") -> RunConfig:
    config = RunConfig()
    config.policy.control, config.self_consistency.wording = control, "brief"
    return config


PAIRS = [
    (inquiry("i0"), scored("i0", [0.2, -1.0, 0.4])),
    (inquiry("i1"), scored("i1", [0.3, 0.3, 0.3], chosen=-1)),  # no spread; nothing for the Solver
    (inquiry("i2"), scored("i2", [0.1, None, None])),  # one question with a score: nothing to compare it with
    (inquiry("i3"), scored("i3", [0.1, None, 0.7], chosen=0, solver=(None, 0.25))),
    (inquiry("i4"), scored("i4", [0.1, 0.2, 0.3], status="failed")),
]


def test_replies_are_compared_with_the_others_on_their_image():
    data = proposer_data(PAIRS, config_with().policy, 0)
    assert data.counts == {"groups_used": 2, "groups_zero_std": 1, "groups_failed": 2, "texts": 5}
    assert data.groups == [[0, 1, 2], [6, 7]] and data.zero_std_share == pytest.approx(1 / 3)
    values = torch.tensor([0.2, -1.0, 0.4], dtype=torch.float64)  # the reply without a question takes part
    expected = (values - values.mean()) / values.std()
    assert [s.advantage for s in data.samples[:3]] == pytest.approx(expected.tolist(), abs=1e-6)
    assert [s.advantage for s in data.samples[3:6]] == [0.0] * 3
    assert [s.advantage for s in data.samples[6:]] == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-6)
    third = data.samples[2]
    assert (third.question, third.ids.tolist(), int(third.image[0, 0, 0])) == (TASK, [20], 0)
    assert data.samples[1].ids.tolist() == [10, 11, 12]  # without padding
    assert data.samples[1].old_log_probs.tolist() == pytest.approx([-1.0, -1.1, -1.2])
    assert data.reward_mean == pytest.approx((0.2 - 1.0 + 0.4 + 0.9 + 0.8) / 8)


def test_answers_belong_to_the_chosen_question_in_the_framing_that_they_were_sampled_from():
    data = solver_data(PAIRS, config_with(), 0)
    assert data.counts == {"groups_used": 3, "groups_skipped": 1, "groups_failed": 1, "texts": 5}
    assert [s.key for s in data.samples] == [
        "i0, answer 0", "i0, answer 1", "i2, answer 0", "i2, answer 1", "i3, answer 1",
    ]  # fmt: skip
    assert data.groups == [[0, 1], [2, 3], [4]]
    assert [s.question for s in data.samples[:2]] == ["what is 1?", "question: what is 1?"]
    assert data.samples[4].question == "question: what is 0?"  # the first answer could not be read
    assert [s.reward for s in data.samples] == [0.5, -0.5, 0.5, -0.5, 0.25]
    assert data.samples[1].ids.tolist() == [130, 131] and data.samples[4].ids.tolist() == [110, 111]
    assert data.samples[1].old_log_probs.tolist() == pytest.approx([-1.30, -1.31])


def test_nothing_chosen_is_nothing_to_learn():
    data = solver_data(PAIRS[1:2], config_with(), 0)
    assert (data.samples, data.groups, data.reward_mean) == ([], [], None)
    assert data.counts == {"groups_used": 0, "groups_skipped": 1, "groups_failed": 0, "texts": 0}


def test_shuffled_control_permutes_rewards_over_the_iteration():
    pairs = [(inquiry(f"i{i}"), scored(f"i{i}", [i, i + 0.1, i + 0.2], solver=(i, i + 0.5))) for i in range(8)]
    for read in (lambda c, seed: proposer_data(pairs, c.policy, seed), lambda c, seed: solver_data(pairs, c, seed)):
        data = read(config_with("shuffled"), 7)
        true, used = [s.reward for s in data.samples], [s.used_reward for s in data.samples]
        assert used != true and sorted(used) == sorted(true)
        assert sum(int(u) != int(t) for u, t in zip(used, true, strict=True)) > len(true) / 2  # to other images
        assert [s.used_reward for s in read(config_with("shuffled"), 7).samples] == used
        assert [s.used_reward for s in read(config_with("shuffled"), 8).samples] != used
        assert data.reward_mean == read(config_with(), 7).reward_mean  # what is reported stays true
    first = torch.tensor([s.used_reward for s in proposer_data(pairs, config_with("shuffled").policy, 7).samples[:3]])
    found = [s.advantage for s in proposer_data(pairs, config_with("shuffled").policy, 7).samples[:3]]
    assert found == pytest.approx(((first - first.mean()) / first.std()).tolist(), abs=1e-5)
