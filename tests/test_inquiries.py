"""Records of inquiries and their rewards: stored and read unchanged, refused where they contradict themselves."""

import copy

import numpy as np
import pytest
import torch

from tests.made_inquiry import asked, inquiry, unasked
from unified_rl.config import SelfConsistencyConfig
from unified_rl.inquiries import INQUIRY_TENSORS, InquiryRecord, InquiryReward
from unified_rl.record_parts import RecordError
from unified_rl.records import ImageRecord
from unified_rl.reward.inquiry import InquiryState, score_inquiries


def made():
    return inquiry("i1", asked(answers=["red"] * 4 + ["blue"] * 3), unasked())


def made_reward():
    return score_inquiries([made()], InquiryState.start(), SelfConsistencyConfig(wording="brief"))[0]


def test_an_inquiry_comes_back_unchanged():
    record = made()
    back = InquiryRecord.from_members("i1", record.to_members(), "shard")
    assert back.questions == record.questions
    assert np.array_equal(back.image, record.image)
    assert set(back.tensors) == set(INQUIRY_TENSORS)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in record.tensors.items())
    assert back.to_members() == record.to_members()


def test_rewards_come_back_unchanged():
    reward = made_reward()
    assert vars(InquiryReward.from_members("i1", reward.to_members(), "shard")) == vars(reward)
    assert reward.chosen == 0 and len(reward.solver_rewards) == 7


def test_an_image_comes_back_unchanged():
    record = ImageRecord("i1", np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    back = ImageRecord.from_members("i1", record.to_members(), "shard")
    assert np.array_equal(back.image, record.image) and back.metadata == {}
    with pytest.raises(RecordError, match="belongs to i1"):
        ImageRecord.from_members("i2", record.to_members(), "shard")
    with pytest.raises(RecordError, match="image_id 'a.b'"):
        ImageRecord("a.b", record.image).to_members()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.questions.pop(), "must have 2 questions"),
        (lambda r: r.questions[0].pop("task"), "question 0 must have"),
        (lambda r: r.questions[0].update(truncated=1), "truncated is neither true nor false"),
        (lambda r: r.questions[0].update(skipped="no_question"), "either a question or the reason"),
        (lambda r: r.questions[1].update(skipped=""), "either a question or the reason"),
        (lambda r: r.questions[0]["answers"].pop(), "pieces, answers and marks"),
        (lambda r: r.questions[0].update(greedy_pieces=["red"]), "pieces, answers and marks"),
        (lambda r: r.questions[0].update(greedy_pieces=["a", "\ud800"]), "no Unicode text"),
        (lambda r: r.tensors.pop("greedy_ids"), "tensors must be"),
        (lambda r: r.tensors["greedy_entropies"].fill_(float("nan")), "non-finite"),
        (lambda r: r.tensors["proposer_lengths"].fill_(4), "outside 0..3"),
        (lambda r: r.tensors["answer_lengths"].zero_(), "lengths do not fit"),
        (lambda r: r.tensors["answer_lengths"].fill_(1), "lengths do not fit"),
    ],
)
def test_an_inquiry_that_contradicts_itself_is_refused(change, message):
    record = made()
    change(record)
    with pytest.raises(RecordError, match=message):
        record.to_members()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.questions[0].update(reward=float("nan")), "no finite number"),
        (lambda r: r.questions[0].update(rank=None), "no finite number"),
        (lambda r: r.questions[1].update(rank=0.5), "skipped but has a score"),
        (lambda r: r.questions[0].update(votes={"red": 7}), "votes are not those"),
        (lambda r: setattr(r, "chosen", 2), "no question of 2"),
        (lambda r: setattr(r, "chosen", -1), "why_none is empty"),
        (lambda r: r.solver_rewards.pop(), "a number for each readable answer"),
        (lambda r: r.solver_rewards.__setitem__(0, None), "a number for each readable answer"),
        (lambda r: setattr(r, "status", "failed"), "reason is empty"),
        (lambda r: setattr(r, "status", "good"), "not one of"),
    ],
)
def test_a_reward_that_contradicts_itself_is_refused(change, message):
    reward = copy.deepcopy(made_reward())
    change(reward)
    with pytest.raises(RecordError, match=message):
        reward.to_members()
