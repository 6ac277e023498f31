"""Records: round trips, and every way in which content can be wrong."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_rl import record_parts
from unified_rl.backbones.base import FlowTraj, TokenTraj
from unified_rl.record_parts import RecordError, sample_key
from unified_rl.records import PromptRecord, RewardRecord, RolloutRecord


def image_of(height=4, width=5):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rollout(**changes):
    values = {
        "prompt": PromptRecord("p-1", "a red circle", {"tag": "single_object"}), "sample": 3, "seed": 2**63 - 1,
        "policy_version": "base", "sampling": {"temperature": 1.0}, "image": image_of(),
        "tensors": {"actions": torch.tensor([3, 1, 2]), "log_probs": torch.tensor([-0.5, -1.0, -0.25])},
    }  # fmt: skip
    return RolloutRecord(**{**values, **changes})


def reward(**changes):
    values = {
        "key": "p-1_03", "prompt_id": "p-1", "policy_version": "base", "status": "ok", "reward": 0.5,
        "components": {"likelihood": 0.5}, "tokens": ["a", " red"],
        "tensors": {"token_log_probs": torch.tensor([-0.5, -0.9]), "reference_log_probs": torch.tensor([-1.0])},
    }  # fmt: skip
    return RewardRecord(**{**values, **changes})


def flow(**changes):
    tensors = {
        "final": torch.zeros(4, 6), "latents": torch.zeros(3, 4, 6), "steps": torch.tensor([2, 3]).int(),
        "log_probs": torch.zeros(2),
    }  # fmt: skip
    tensors |= changes
    return rollout(tensors={name: tensor for name, tensor in tensors.items() if tensor is not None})


REGIONS = [
    {"box": [0, 0, 16, 32], "score": -0.5, "object": "cup", "reason": "bent"},
    {"box": [16, 0, 32, 4096], "score": None, "object": "", "reason": "the reply holds no score for region 2"},
]


def regional(**changes):
    values = {
        "components": {"alpha": 0.75, "global_score": 0.5}, "tokens": [], "regions": REGIONS,
        "tensors": {"reward_map": torch.tensor([[-0.5, 0.0, 1.0]])}, **changes,
    }  # fmt: skip
    return reward(**values)


def changed_json(members, **changes):
    content = json.loads(members["json"])
    for name, value in changes.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    return {**members, "json": json.dumps(content).encode()}


def test_sample_key():
    assert sample_key("p-1", 3) == "p-1_03"
    assert sample_key("p-1", 123) == "p-1_123"
    for prompt_id, sample in [("a.b", 0), ("", 0), ("a/b", 0), ("a" * 81, 0), ("ok", -1), ("ok", 10**6), ("ok", True)]:
        with pytest.raises(RecordError):
            sample_key(prompt_id, sample)


def test_longest_key_fits_a_plain_tar_name():
    key = sample_key("a" * 80, 10**6 - 1)
    assert record_parts.KEY.fullmatch(key)
    assert len(f"{key}.safetensors") <= 100


def test_rollout_round_trip():
    record = rollout(plan="first a circle, then red")
    members = record.to_members()
    assert sorted(members) == ["json", "png", "safetensors"]
    back = RolloutRecord.from_members("p-1_03", members, "s.tar")
    assert (back.prompt, back.sample, back.seed, back.plan) == (record.prompt, 3, 2**63 - 1, record.plan)
    assert np.array_equal(back.image, record.image) and back.image.flags.writeable
    assert torch.equal(back.tensors["actions"], record.tensors["actions"])
    assert back.tensors["log_probs"].dtype == torch.float32
    assert torch.equal(back.tensors["log_probs"], record.tensors["log_probs"])
    assert back.to_members() == members


def test_same_record_same_bytes():
    assert rollout().to_members() == rollout().to_members()


def test_reward_round_trip():
    members = reward().to_members()
    back = RewardRecord.from_members("p-1_03", members, "s.tar")
    assert (back.status, back.reward, back.components, back.tokens) == ("ok", 0.5, {"likelihood": 0.5}, ["a", " red"])
    assert torch.equal(back.tensors["token_log_probs"], torch.tensor([-0.5, -0.9]))
    assert back.to_members() == members


def test_flow_round_trip():
    for record in (flow(), flow(latents=None, steps=None, log_probs=None)):
        back = RolloutRecord.from_members("p-1_03", record.to_members(), "s.tar")
        assert set(back.tensors) == set(record.tensors)
        assert all(torch.equal(back.tensors[name], tensor) for name, tensor in record.tensors.items())
        assert back.to_members() == record.to_members()


@pytest.mark.parametrize("decisions", [0, 3])
def test_what_trajectories_store_is_accepted(decisions):
    made = FlowTraj(
        torch.zeros(1, decisions + 1, 4, 6),
        torch.arange(decisions)[None],
        torch.zeros(1, decisions),
        torch.ones(1, 4, 6),
    )
    assert rollout(tensors=made.tensors(0)).to_members()
    assert rollout(tensors=TokenTraj(torch.arange(4)[None], torch.zeros(1, 4)).tensors(0)).to_members()


def test_regional_round_trip():
    members = regional().to_members()
    back = RewardRecord.from_members("p-1_03", members, "s.tar")
    assert back.regions == REGIONS and back.tokens == []
    assert torch.equal(back.tensors["reward_map"], torch.tensor([[-0.5, 0.0, 1.0]]))
    assert back.to_members() == members


@pytest.mark.parametrize(
    "tensors",
    [
        {"reference_log_probs": torch.zeros(3)},
        {"reference_means": torch.zeros(3, 4, 6)},
        {"reference_log_probs": torch.zeros(3), "reference_means": torch.zeros(3, 4, 6)},
    ],
)
def test_a_reference_beside_a_map_is_accepted(tensors):
    record = regional(tensors={"reward_map": torch.zeros(2, 2), **tensors})
    back = RewardRecord.from_members("p-1_03", record.to_members(), "s.tar")
    assert set(back.tensors) == {"reward_map", *tensors}


def test_a_map_without_regions_is_accepted():
    """The judge was asked about the whole image alone, or nothing was proposed."""
    assert regional(regions=[]).to_members()


def test_a_failed_image_keeps_what_was_read_of_its_regions():
    record = regional(status="failed", reward=None, reason="global score: none", tensors={})
    back = RewardRecord.from_members("p-1_03", record.to_members(), "s.tar")
    assert back.regions == REGIONS and back.tensors == {}


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_failed_reward_round_trip(status):
    record = reward(status=status, reward=None, reason="no tokens", tokens=[], tensors={}, components={})
    back = RewardRecord.from_members("p-1_03", record.to_members(), "s.tar")
    assert (back.status, back.reward, back.reason) == (status, None, "no tokens")


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50).filter(str.strip))
def test_any_text_survives(text):
    members = PromptRecord("p", text, {"note": text}).to_members()
    assert PromptRecord.from_members("p", members, "s.tar") == PromptRecord("p", text, {"note": text})


def test_json_carries_the_schema_of_its_kind():
    for record, version in ((rollout(), 2), (flow(), 2), (reward(), 2), (PromptRecord("p", "x"), 1)):
        assert json.loads(record.to_members()["json"])["schema"] == version == record.SCHEMA


@pytest.mark.parametrize("version", [None, 0, 1, 3, "2", 2.5, True])
@pytest.mark.parametrize("record", [rollout(), reward()], ids=["roll", "reward"])
def test_wrong_schema_version(record, version):
    members = changed_json(record.to_members(), schema=version)
    with pytest.raises(RecordError, match=r"s\.tar: key p-1_03: schema version .* reads version 2"):
        type(record).from_members("p-1_03", members, "s.tar")


@pytest.mark.parametrize("version", [None, 0, 2, "1", 1.5, True])
def test_wrong_schema_version_of_a_prompt(version):
    members = changed_json(PromptRecord("p-1_03", "x").to_members(), schema=version)
    with pytest.raises(RecordError, match=r"s\.tar: key p-1_03: schema version .* reads version 1"):
        PromptRecord.from_members("p-1_03", members, "s.tar")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2**63}, "seed"),
        ({"seed": -1}, "seed"),
        ({"policy_version": ""}, "policy_version is empty"),
        ({"policy_version": 5}, "policy_version must be text"),
        ({"sampling": []}, "sampling must be an object"),
        ({"sampling": {"temperature": float("nan")}}, "JSON"),
        ({"tensors": {"log_probs": torch.zeros(2)}}, "tensors log_probs are no trajectory"),
        ({"tensors": {"actions": torch.arange(2)}}, "tensors actions are no trajectory"),
        ({"tensors": {}}, "are no trajectory of tokens or of a flow"),
        (
            {"tensors": {"actions": torch.arange(2), "log_probs": torch.zeros(2), "extra": torch.zeros(2)}},
            "tensors actions, extra, log_probs are no trajectory",
        ),
        ({"tensors": {"actions": [1, 2], "log_probs": torch.zeros(2)}}, "actions is no tensor"),
        ({"tensors": {"actions": torch.zeros(2), "log_probs": torch.zeros(2)}}, "actions is torch.float32"),
        ({"tensors": {"actions": torch.arange(2), "log_probs": torch.zeros(2).double()}}, "log_probs is torch.float64"),
        (
            {"tensors": {"actions": torch.arange(2), "log_probs": torch.zeros(3)}},
            "S is 2 in tensor actions but 3 in tensor log_probs",
        ),
        ({"tensors": {"actions": torch.zeros(1, 2).long(), "log_probs": torch.zeros(2)}}, r"not \[S\]"),
        ({"tensors": {"actions": torch.zeros(0).long(), "log_probs": torch.zeros(0)}}, r"not \[S\]"),
        ({"tensors": {"actions": torch.arange(2), "log_probs": torch.tensor([0.0, torch.nan])}}, "non-finite"),
        ({"image": np.zeros((4, 4), np.uint8)}, "uint8"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, "uint8"),
        ({"image": np.zeros((4097, 1, 3), np.uint8)}, "4096"),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, "4096"),
        ({"plan": "\ud800"}, "Unicode"),
        ({"prompt": PromptRecord("p-1", " ")}, "text is empty"),
        ({"prompt": PromptRecord("p-1", "x" * 32769)}, "longer than"),
    ],
)
def test_rollout_that_breaks_the_contract_is_not_written(changes, message):
    with pytest.raises(RecordError, match=message) as error:
        rollout(**changes).to_members()
    assert "p-1_03" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final": None}, "latents, log_probs, steps are no trajectory"),
        ({"latents": None}, "final, log_probs, steps are no trajectory"),
        ({"steps": None}, "are no trajectory"),
        ({"log_probs": None}, "are no trajectory"),
        ({"steps": None, "log_probs": None}, "are no trajectory"),
        ({"actions": torch.arange(2)}, "are no trajectory"),
        ({"extra": torch.zeros(2)}, "are no trajectory"),
        ({"final": torch.zeros(4, 6).double()}, "final is torch.float64"),
        ({"final": torch.zeros(1, 4, 6)}, r"final has shape \[1, 4, 6\], not \[N, D\]"),
        ({"final": torch.zeros(0, 6)}, r"final has shape \[0, 6\], not \[N, D\]"),
        ({"final": torch.full((4, 6), torch.inf)}, "final has a non-finite"),
        ({"final": torch.zeros(5, 6)}, "N is 5 in tensor final but 4 in tensor latents"),
        ({"final": torch.zeros(4, 5)}, "D is 5 in tensor final but 6 in tensor latents"),
        ({"latents": torch.zeros(3, 4, 6).bfloat16()}, "latents is torch.bfloat16"),
        ({"latents": torch.zeros(3, 24)}, r"latents has shape \[3, 24\], not \[S \+ 1, N, D\]"),
        ({"latents": torch.full((3, 4, 6), torch.nan)}, "latents has a non-finite"),
        ({"latents": torch.zeros(2, 4, 6)}, "2 latents, not one more than the 2 steps"),
        ({"latents": torch.zeros(4, 4, 6)}, "4 latents, not one more than the 2 steps"),
        ({"log_probs": torch.zeros(3)}, "S is 2 in tensor steps but 3 in tensor log_probs"),
        ({"log_probs": torch.tensor([0.0, -torch.inf])}, "log_probs has a non-finite"),
        ({"steps": torch.zeros(2)}, "steps is torch.float32"),
        ({"steps": torch.tensor([3, 2])}, "steps .* are not consecutive"),
        ({"steps": torch.tensor([2, 4])}, "steps .* are not consecutive"),
        ({"steps": torch.tensor([-1, 0])}, "steps .* are not consecutive"),
        (
            {"steps": torch.zeros(0).int(), "log_probs": torch.zeros(0), "latents": torch.zeros(1, 4, 6)},
            r"not \[S\]",
        ),
    ],
)
def test_flow_that_breaks_the_contract_is_not_written(changes, message):
    with pytest.raises(RecordError, match=f"key p-1_03: .*{message}"):
        flow(**changes).to_members()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": float("nan")}, "finite reward"),
        ({"reward": float("inf")}, "finite reward"),
        ({"reward": None}, "finite reward"),
        ({"reward": True}, "finite reward"),
        ({"reward": 10**400}, "finite reward"),
        ({"components": {"a": float("-inf")}}, "component a"),
        ({"status": "perfect"}, "status 'perfect'"),
        ({"status": "failed", "reward": 0.0, "reason": "x"}, "must not carry a reward"),
        ({"status": "failed", "reward": None}, "needs a reason"),
        ({"status": "failed", "reward": None, "reason": 3}, "reason must be text"),
        ({"tokens": ["a"]}, "2 token_log_probs but 1 tokens"),
        ({"tokens": ["a", 1]}, "list of text"),
        ({"tensors": {}}, "0 token_log_probs but 2 tokens"),
        ({"tokens": []}, "2 token_log_probs but 0 tokens"),
        ({"tensors": {"token_log_probs": torch.zeros(2).half()}}, "token_log_probs is torch.float16"),
        ({"tensors": {"token_log_probs": torch.zeros(1, 2)}}, r"token_log_probs has shape \[1, 2\], not \[L\]"),
        ({"tensors": {"token_log_probs": torch.zeros(2), "other": torch.zeros(2)}}, "tensor other is none of"),
        ({"regions": None}, "regions must be a list"),
        (
            {"tensors": {"token_log_probs": torch.zeros(2), "reference_log_probs": torch.tensor([torch.inf])}},
            "reference_log_probs has a non-finite",
        ),
        ({"prompt_id": "other"}, "no sample of prompt other"),
    ],
)
def test_reward_that_breaks_the_contract_is_not_written(changes, message):
    with pytest.raises(RecordError, match=message) as error:
        reward(**changes).to_members()
    assert "p-1_03" in str(error.value)


MAP = torch.zeros(2, 2)


def one_region(**changes):
    return {"regions": [{**REGIONS[0], **changes}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {}}, "regions without the tensor reward_map"),
        ({"tensors": {"reward_map": MAP.flatten()}}, r"reward_map has shape \[4\], not \[h, w\]"),
        ({"tensors": {"reward_map": MAP[:0]}}, r"reward_map has shape \[0, 2\]"),
        ({"tensors": {"reward_map": MAP.double()}}, "reward_map is torch.float64"),
        ({"tensors": {"reward_map": MAP + 1.001}}, "reward_map has a value outside -1..1"),
        ({"tensors": {"reward_map": MAP - 1.001}}, "reward_map has a value outside -1..1"),
        ({"tensors": {"reward_map": MAP + torch.nan}}, "reward_map has a non-finite"),
        ({"tensors": {"reward_map": MAP, "reference_log_probs": torch.zeros(1, 2)}}, r"\[1, 2\], not \[S\]"),
        ({"tensors": {"reward_map": MAP, "reference_means": torch.zeros(2, 4)}}, r"\[2, 4\], not \[S, N, D\]"),
        ({"tensors": {"reward_map": MAP, "reference_means": torch.zeros(2, 4, 6).int()}}, "means is torch.int32"),
        (
            {"tensors": {"reference_log_probs": torch.zeros(2), "reference_means": torch.zeros(3, 4, 6)}},
            "S is 2 in tensor reference_log_probs but 3 in tensor reference_means",
        ),
        ({"components": {}}, "reward_map needs the component alpha in 0..1, not nan"),
        ({"components": {"alpha": 1.01}}, "reward_map needs the component alpha in 0..1, not 1.01"),
        ({"components": {"alpha": -0.1}}, "reward_map needs the component alpha in 0..1, not -0.1"),
        ({"regions": {}}, "regions must be a list"),
        ({"regions": REGIONS[:1] * 257}, "257 regions, more than 256"),
        ({"regions": [REGIONS[0], []]}, "region 2 must have exactly box, score, object and reason"),
        ({"regions": [{"box": [0, 0, 1, 1], "score": 0.0, "object": ""}]}, "region 1 must have exactly"),
        (one_region(area=3), "region 1 must have exactly"),
        (one_region(box=(0, 0, 1, 1)), "region 1: box .* must be four whole numbers in 0..4096"),
        (one_region(box=[0, 0, 1]), "must be four whole"),
        (one_region(box=[0, 0, 1, 1.0]), "must be four whole"),
        (one_region(box=[0, 0, 1, True]), "must be four whole"),
        (one_region(box=[-1, 0, 1, 1]), "must be four whole"),
        (one_region(box=[0, 0, 4097, 1]), "must be four whole"),
        (one_region(box=[2, 0, 2, 1]), "is empty or inverted"),
        (one_region(box=[0, 3, 2, 1]), "is empty or inverted"),
        (one_region(score=1.01), "region 1: score 1.01 is not in -1..1"),
        (one_region(score=float("nan")), "score nan is not in"),
        (one_region(score=True), "score True is not in"),
        (one_region(score="0.5"), "score '0.5' is not in"),
        (one_region(score=None, reason=" "), "region 1: a score that is null needs a reason"),
        (one_region(object=None), "object must be text"),
        (one_region(object="\ud800"), "object is not valid Unicode"),
        (one_region(object="x" * 1001), "region 1: object is longer than 1000"),
        (one_region(reason="x" * 1001), "region 1: reason is longer than 1000"),
    ],
)
def test_regions_that_break_the_contract_are_not_written(changes, message):
    with pytest.raises(RecordError, match=f"key p-1_03: .*{message}"):
        regional(**changes).to_members()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (one_region(score=1.01), "score 1.01 is not in"),
        ({"tensors": {"reward_map": MAP + torch.nan}}, "reward_map has a non-finite"),
        ({"tensors": {"other": MAP}}, "tensor other is none of"),
    ],
)
def test_failed_records_are_checked_as_well(changes, message):
    with pytest.raises(RecordError, match=message):
        regional(status="failed", reward=None, reason="unread", **changes).to_members()


def test_regions_in_the_file_are_checked_as_well():
    members = changed_json(regional().to_members(), regions=[{**REGIONS[0], "score": 3}])
    with pytest.raises(RecordError, match=r"s\.tar: key p-1_03: region 1: score 3 is not in -1..1"):
        RewardRecord.from_members("p-1_03", members, "s.tar")
    members = regional().to_members()
    members["safetensors"] = safetensors.torch.save({"reward_map": MAP + 2})
    with pytest.raises(RecordError, match=r"s\.tar: key p-1_03: tensor reward_map has a value outside"):
        RewardRecord.from_members("p-1_03", members, "s.tar")


def read_rollout(members, key="p-1_03"):
    return RolloutRecord.from_members(key, members, "run/shard-00007.tar")


@pytest.mark.parametrize("bad", [b"NaN", b'{"a": NaN}', b"[]", b"\xff", b"", b"{", b"[" * 100_000])
def test_bad_json(bad):
    with pytest.raises(RecordError, match=r"run/shard-00007\.tar: key p-1_03: "):
        read_rollout({**rollout().to_members(), "json": bad})


def test_non_finite_reward_in_the_file():
    members = reward().to_members()
    for bad in (b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"9" * 400):
        broken = {**members, "json": members["json"].replace(b'"reward": 0.5', b'"reward": ' + bad)}
        assert broken["json"] != members["json"]
        with pytest.raises(RecordError, match=r"s\.tar: key p-1_03: "):
            RewardRecord.from_members("p-1_03", broken, "s.tar")


@pytest.mark.parametrize("bad", [b"NaN", b"-Infinity", b"1e999", b"-1e999"])
def test_non_finite_numbers_anywhere_in_the_file(bad):
    members = rollout(sampling={"temperature": 0.125}).to_members()
    broken = {**members, "json": members["json"].replace(b"0.125", bad)}
    assert broken["json"] != members["json"]
    with pytest.raises(RecordError, match=r"key p-1_03: \.json is not valid: .* is not a finite number"):
        read_rollout(broken)


def test_unknown_and_missing_fields_and_members():
    members = rollout().to_members()
    with pytest.raises(RecordError, match="unknown field colour"):
        read_rollout(changed_json(members, colour="red"))
    with pytest.raises(RecordError, match="missing or unknown field seed"):
        read_rollout(changed_json(members, seed=None))
    with pytest.raises(RecordError, match=r"unexpected member \.txt"):
        read_rollout({**members, "txt": b""})
    with pytest.raises(RecordError, match=r"member \.png"):
        read_rollout({name: data for name, data in members.items() if name != "png"})


def test_key_must_be_the_samples_own():
    with pytest.raises(RecordError, match="key p-1_04: belongs to p-1_03"):
        read_rollout(rollout().to_members(), "p-1_04")
    with pytest.raises(RecordError, match="key q: belongs to prompt p"):
        PromptRecord.from_members("q", PromptRecord("p", "x").to_members(), "s.tar")
    with pytest.raises(RecordError, match="belongs to "):
        RewardRecord.from_members("p-1_04", reward().to_members(), "s.tar")


def test_damaged_tensors():
    members = rollout().to_members()
    data = members["safetensors"]
    for bad in (b"", data[:5], data[:-1], data + b"x", b"\xff" * 8 + data[8:], data[:8] + b"{" * (len(data) - 8)):
        with pytest.raises(RecordError, match=r"key p-1_03: \.safetensors"):
            read_rollout({**members, "safetensors": bad})
    with pytest.raises(RecordError, match="tensors actions are no trajectory"):
        read_rollout({**members, "safetensors": safetensors.torch.save({"actions": torch.arange(3)})})
