"""Questions of the evaluation, asked greedily and as the Solver is asked, of the tiny Janus."""

import pytest
import torch

from unified_rl.backbones.load import load_backbone
from unified_rl.config import resolve
from unified_rl.evaluation.understanding import answer, question_sets
from unified_rl.shapes.questions import FAMILIES


@pytest.fixture(scope="module")
def config():
    return resolve("self_consistency_janus_shapes", ["evaluate.questions=12", "data.images=x"])


def test_a_solver_is_asked_in_all_framings_too(config):
    assert question_sets(resolve("gvu_janus_shapes")) == question_sets(config)[: 1 + len(FAMILIES)]
    assert set(question_sets(config)[1 + len(FAMILIES) :]) == {f"framed_answering/{family}" for family in FAMILIES}


def test_shares_of_right_answers_depend_on_the_question_alone(config):
    torch.set_num_threads(1)
    backbone = load_backbone(config.backbone)
    shares = {family: answer(backbone, f"framed_answering/{family}", config) for family in ("existence", "number")}
    answers = config.self_consistency.answers
    assert all(round(answers * share, 6).is_integer() for values in shares.values() for share in values)
    assert sum(shares["existence"]) / 12 >= 0.95
    assert 0.2 <= sum(shares["number"]) / 12 <= 0.9
    config.reward.batch_size, before = 42, config.reward.batch_size
    assert answer(backbone, "framed_answering/number", config) == shares["number"]
    config.reward.batch_size = before
