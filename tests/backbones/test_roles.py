"""Adapters by role, and what is sampled as text and then learned from, on both families with random weights."""

import numpy as np
import pytest
import torch

from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.base import BackboneError, nucleus
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.backbones.policy_files import ROLES, is_adapter
from unified_rl.train.drawing import drawing_modules

FAMILIES = {"janus": JanusBackbone, "bagel": BagelBackbone}
QUESTIONS = ["What is it?", "yes no yes", "a red circle", "What is it? Plan it first."]
IDS, MASK = torch.tensor([[5, 6, 7], [8, 9, 5], [7, 7, 8], [6, 5, 9]]), torch.ones(4, 3)


@pytest.fixture(params=FAMILIES)
def folder(request, random_janus_folder, random_bagel_folder):
    return {"janus": random_janus_folder, "bagel": random_bagel_folder}[request.param]


@pytest.fixture
def backbone(folder):
    return load(folder)


def load(folder):
    return FAMILIES["bagel" if (folder / "ae.safetensors").exists() else "janus"].from_pretrained(folder)


def pictures():
    random = np.random.default_rng(0)
    sizes = ((32, 32), (16, 24), None, (50, 90))
    return [size and random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def read(backbone):
    return backbone.answer_logits(pictures(), QUESTIONS, IDS, MASK).detach()


def draw(backbone):
    return backbone.rollout_images(["a red circle"], [1], backbone.sampling_type()).tensors(0)


def change(backbone, role):
    """Values of its own in a role's adapter."""
    generator = torch.Generator().manual_seed(ROLES.index(role))
    for name, parameter in backbone.model.named_parameters():
        if is_adapter(name, role):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def with_roles(backbone):
    for role in ROLES:
        backbone.add_lora(4, 8, role)
        change(backbone, role)
    return backbone


# ---- which adapter acts -------------------------------------------------------------------------------------------


def test_new_adapters_change_no_bit(backbone):
    before, drawn = read(backbone), draw(backbone)
    for role in ROLES:
        backbone.add_lora(4, 8, role)
        with backbone.role(role):
            assert torch.equal(read(backbone), before)
            assert all(torch.equal(tensor, drawn[name]) for name, tensor in draw(backbone).items())
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())


def test_inside_a_role_its_adapter_acts_alone(folder):
    base, backbone = read(load(folder)), with_roles(load(folder))
    assert torch.equal(read(backbone), base)  # outside of all
    found = {}
    for role in ROLES:
        alone = load(folder)
        alone.add_lora(4, 8, role)
        change(alone, role)
        with backbone.role(role):
            found[role] = read(backbone)
        assert torch.equal(found[role], read(alone))  # the only adapter acts
        with alone.role(None):
            assert torch.equal(read(alone), base)
        with alone.role(next(other for other in ROLES if other != role)):
            assert torch.equal(read(alone), base)  # of a role that was never added
    assert not torch.equal(found["proposer"], found["solver"])
    assert not torch.equal(found["solver"], base)
    assert torch.equal(found["generator"], base) == (backbone.family == "bagel")  # its adapter only draws
    with backbone.role(None):
        assert torch.equal(read(backbone), base)


def test_roles_nest_and_come_back_after_errors(backbone):
    with_roles(backbone)
    with backbone.role("proposer"):
        expected = read(backbone)
        with backbone.role(None), backbone.role("solver"):
            assert backbone.acting == "solver"
        assert torch.equal(read(backbone), expected)
        with pytest.raises(ValueError, match="stop"), backbone.role("solver"):
            raise ValueError("stop")
        assert backbone.acting == "proposer"
        assert torch.equal(read(backbone), expected)
    assert backbone.acting is None
    with pytest.raises(BackboneError, match="unknown role 'judge'"), backbone.role("judge"):
        pass


def test_the_nameless_adapter_can_be_switched_off(folder):
    backbone = load(folder)
    before = draw(backbone)
    backbone.add_lora(4, 8)
    for name in backbone.trainable_names("lora"):
        backbone.model.get_parameter(name).data += 0.1
    trained = draw(backbone)["log_probs" if backbone.family == "janus" else "final"]
    with backbone.role(None):
        again = draw(backbone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.items())
    assert not torch.equal(trained, before["log_probs" if backbone.family == "janus" else "final"])
    with backbone.role(None), backbone.role(""):
        assert torch.equal(draw(backbone)["log_probs" if backbone.family == "janus" else "final"], trained)
    with pytest.raises(BackboneError, match="already"):
        backbone.add_lora(4, 8, "solver")


def test_gradients_reach_the_acting_role_alone(backbone):
    with_roles(backbone)
    for name in backbone.trainable_names("lora"):
        backbone.model.get_parameter(name).requires_grad_()
    with backbone.role("solver"):
        backbone.answer_logits(pictures(), QUESTIONS, IDS, MASK).log_softmax(-1)[..., 7].sum().backward()
        with torch.no_grad(), backbone.role(None):
            read(backbone)
    found = {name: p.grad for name, p in backbone.model.named_parameters() if p.grad is not None}
    assert set(found) == {name for name in backbone.trainable_names("lora") if is_adapter(name, "solver")}
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_reading_adapters_belong_to_what_reads(random_bagel_folder):
    backbone = with_roles(BagelBackbone.from_pretrained(random_bagel_folder))
    names = backbone.trainable_names("lora")
    assert len(names) == 3 * 2 * 7 * 2  # roles, layers, projections, factors
    assert all(("_moe_gen" in name) == is_adapter(name, "generator") for name in names)


def test_a_drawings_context_carries_no_gradient_of_another_role(random_bagel_folder):
    backbone = with_roles(BagelBackbone.from_pretrained(random_bagel_folder))
    for name in backbone.trainable_names("lora"):
        backbone.model.get_parameter(name).requires_grad_()
    for role, carries in (("generator", False), ("solver", True)):
        with backbone.role(role):
            keys, _ = backbone._contexts(["a red circle"], None).layers[-1]
        assert keys.requires_grad == carries


# ---- on disk ------------------------------------------------------------------------------------------------------


def test_roles_come_back_from_their_folders(folder, tmp_path):
    expected = {}
    for role in ("solver", "generator"):
        alone = load(folder)
        alone.add_lora(4, 8, role)
        change(alone, role)
        alone.save_policy(tmp_path / role, "lora")
        expected[role] = (read(alone), draw(alone))
        again = load(folder)
        again.load_policy(tmp_path / role, role)
        assert torch.equal(read(again), expected[role][0])
        again.load_policy(tmp_path / role)  # into the only adapter
    base, backbone = read(load(folder)), load(folder)
    backbone.load_roles(tmp_path)
    for role, (logits, drawn) in expected.items():
        with backbone.role(role):
            assert torch.equal(read(backbone), logits)
            assert all(torch.equal(tensor, drawn[name]) for name, tensor in draw(backbone).items())
    with backbone.role("proposer"):
        assert torch.equal(read(backbone), base)
    assert torch.equal(read(backbone), base)
    with pytest.raises(BackboneError, match="solver, generator; name one"):
        backbone.save_policy(tmp_path / "both", "lora")
    backbone.load_roles(tmp_path)  # again: the same adapters take the weights
    assert len(backbone.adapters) == 2


def test_one_loaded_role_does_not_act_by_itself(folder, tmp_path):
    alone = load(folder)
    alone.add_lora(4, 8, "solver")
    change(alone, "solver")
    alone.save_policy(tmp_path / "solver", "lora")
    backbone = load(folder)
    base = read(backbone)
    backbone.load_roles(tmp_path)
    assert torch.equal(read(backbone), base)
    with pytest.raises(BackboneError, match="no role's policy"):
        backbone.load_roles(tmp_path / "solver")


def test_an_adapter_of_another_kind_of_role_is_refused(random_bagel_folder, tmp_path):
    backbone = BagelBackbone.from_pretrained(random_bagel_folder)
    backbone.add_lora(4, 8, "solver")
    backbone.save_policy(tmp_path, "lora")
    with pytest.raises(BackboneError, match="this backbone adapts"):
        BagelBackbone.from_pretrained(random_bagel_folder).load_policy(tmp_path, "generator")


# ---- text that is sampled and learned from ------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answer_logits_are_those_that_were_sampled_from(backbone, temperature):
    answers = backbone.rollout_text(pictures(), QUESTIONS, [1, 2, 3, 4], 7, temperature)
    mask = answers.mask.clone()
    mask[1, 4:] = mask[2, 1:] = 0  # as if they had ended early
    logits = backbone.answer_logits(pictures(), QUESTIONS, answers.ids, mask)
    assert logits.dtype == torch.float32
    assert logits.shape[:2] == answers.ids.shape
    log_probs = logits.log_softmax(-1)
    taken = log_probs.gather(-1, answers.ids[..., None])[..., 0]
    assert ((taken - answers.log_probs) * mask).abs().max() < 1e-4
    assert ((-(log_probs.exp() * log_probs).sum(-1) - answers.entropies) * mask).abs().max() < 1e-4
    for row in range(4):
        length = int(mask[row].sum())
        alone = backbone.answer_logits(
            pictures()[row : row + 1], QUESTIONS[row : row + 1], answers.ids[row : row + 1, :length], mask[:1, :length]
        )
        assert (alone[0] - logits[row, :length]).abs().max() < 1e-4


def test_reading_never_runs_what_is_frozen_then(backbone):
    expected = read(backbone)
    used = drawing_modules(backbone.model, backbone.frozen_when_reading())
    kept = {id(p) for _, module in used for p in module.parameters()}
    dropped = [p for p in backbone.model.parameters() if id(p) not in kept]
    for parameter in dropped:
        parameter.data.fill_(torch.nan)
    assert dropped
    assert torch.equal(read(backbone), expected)


def test_the_nucleus_by_hand():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]])
    for top_p, kept in ((0.4, [1]), (0.7, [1, 3]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        left = nucleus(probabilities.log(), top_p)[0]
        assert left.isfinite().nonzero()[:, 0].tolist() == kept
        assert torch.equal(left[kept], probabilities.log()[0, kept])
    assert nucleus(probabilities.log(), 0.6)[1].isfinite().tolist() == [True, True, True, False]
    assert torch.equal(nucleus(probabilities.log(), 1.0), probabilities.log())


def test_sampling_from_the_nucleus_belongs_to_the_seed(backbone):
    """A nucleus of one token is greedy; the log-probs are those of the whole distribution."""
    whole = backbone.rollout_text(pictures(), QUESTIONS, [1, 2, 3, 4], 6, 0.9, top_p=0.7)
    one = backbone.rollout_text(pictures()[1:2], QUESTIONS[1:2], [2], 6, 0.9, top_p=0.7)
    assert torch.equal(one.ids[0], whole.ids[1, : one.ids.shape[1]])
    with torch.no_grad():
        logits = backbone.answer_logits(pictures(), QUESTIONS, whole.ids, whole.mask) / 0.9
    taken = logits.log_softmax(-1).gather(-1, whole.ids[..., None])[..., 0]
    assert ((taken - whole.log_probs) * whole.mask).abs().max() < 1e-4
    rows = nucleus(logits.flatten(0, 1), 0.7).gather(-1, whole.ids.flatten()[:, None])
    assert rows[whole.mask.flatten() > 0].isfinite().all()
    assert not torch.equal(whole.ids, backbone.rollout_text(pictures(), QUESTIONS, [1, 2, 3, 4], 6, 0.9).ids)
    narrow = backbone.rollout_text(pictures(), QUESTIONS, [1, 2, 3, 4], 6, 0.9, top_p=1e-6)
    assert torch.equal(narrow.ids, backbone.rollout_text(pictures(), QUESTIONS, [1, 2, 3, 4], 6, 0.0).ids)
    with pytest.raises(BackboneError, match=r"top_p 0\.0"):
        backbone.rollout_text([None], ["yes"], [1], 1, 1.0, top_p=0.0)
