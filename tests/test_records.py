"""Records: round trips, and every way in which content can be wrong."""

import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unified_rl import records
from unified_rl.records import PromptRecord, RecordError, RewardRecord, RolloutRecord, decode_png, sample_key


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
    assert records.KEY.fullmatch(key)
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


def test_reward_round_trip():
    members = reward().to_members()
    back = RewardRecord.from_members("p-1_03", members, "s.tar")
    assert (back.status, back.reward, back.components, back.tokens) == ("ok", 0.5, {"likelihood": 0.5}, ["a", " red"])
    assert torch.equal(back.tensors["token_log_probs"], torch.tensor([-0.5, -0.9]))
    assert back.to_members() == members


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


def test_json_carries_the_schema():
    for record in (rollout(), reward(), PromptRecord("p", "x")):
        assert json.loads(record.to_members()["json"])["schema"] == 1


@pytest.mark.parametrize("version", [None, 0, 2, "1", 1.5, True])
@pytest.mark.parametrize("record", [rollout(), reward(), PromptRecord("p-1_03", "x")], ids=["roll", "reward", "prompt"])
def test_wrong_schema_version(record, version):
    members = changed_json(record.to_members(), schema=version)
    with pytest.raises(RecordError, match=r"s\.tar: key p-1_03: schema version .* reads version 1"):
        type(record).from_members("p-1_03", members, "s.tar")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2**63}, "seed"),
        ({"seed": -1}, "seed"),
        ({"policy_version": ""}, "policy_version is empty"),
        ({"policy_version": 5}, "policy_version must be text"),
        ({"sampling": []}, "sampling must be an object"),
        ({"sampling": {"temperature": float("nan")}}, "JSON"),
        ({"tensors": {"log_probs": torch.zeros(2)}}, "tensor actions is missing"),
        ({"tensors": {"actions": torch.zeros(2), "log_probs": torch.zeros(2)}}, "actions is torch.float32"),
        ({"tensors": {"actions": torch.arange(2), "log_probs": torch.zeros(2).double()}}, "log_probs is torch.float64"),
        ({"tensors": {"actions": torch.arange(2), "log_probs": torch.zeros(3)}}, "2 actions but 3 log_probs"),
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
        ({"tensors": {}}, "token_log_probs is missing"),
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
    with pytest.raises(RecordError, match="key p-1_04: belongs to sample p-1_03"):
        read_rollout(rollout().to_members(), "p-1_04")
    with pytest.raises(RecordError, match="key q: belongs to prompt p"):
        PromptRecord.from_members("q", PromptRecord("p", "x").to_members(), "s.tar")
    with pytest.raises(RecordError, match="belongs to sample"):
        RewardRecord.from_members("p-1_04", reward().to_members(), "s.tar")


def test_damaged_tensors():
    members = rollout().to_members()
    data = members["safetensors"]
    for bad in (b"", data[:5], data[:-1], data + b"x", b"\xff" * 8 + data[8:], data[:8] + b"{" * (len(data) - 8)):
        with pytest.raises(RecordError, match=r"key p-1_03: \.safetensors"):
            read_rollout({**members, "safetensors": bad})
    with pytest.raises(RecordError, match="log_probs is missing"):
        read_rollout({**members, "safetensors": safetensors.torch.save({"actions": torch.arange(3)})})


# PNG


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width, height, depth=8, colour=2, interlace=0):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def pixels(height, width):
    return chunk(b"IDAT", zlib.compress((b"\0" + bytes(3 * width)) * height))


END = chunk(b"IEND", b"")


def test_own_builder_makes_a_readable_png():
    assert decode_png(png(header(5, 4), pixels(4, 5), END), "here").shape == (4, 5, 3)


@pytest.mark.parametrize("size", [(4097, 1), (1, 4097), (0, 4), (60000, 60000), (2**31 - 1, 2**31 - 1)])
def test_large_images_are_refused_before_decoding(monkeypatch, size):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoding started"))
    with pytest.raises(RecordError, match="here: image of .* sides must lie in 1..4096"):
        decode_png(png(header(*size), pixels(4, 4), END), "here")


def test_second_header_cannot_enlarge_the_image():
    data = png(header(4, 4), header(4096, 4096), pixels(4, 4), END)
    with pytest.raises(RecordError, match="here"):
        decode_png(data, "here")


def test_bomb_behind_a_small_header_stays_small():
    bomb = zlib.compress(bytes(200 << 20), 9)
    text = chunk(b"zTXt", b"k\0\0" + bomb)
    for data in (png(header(4, 4), chunk(b"IDAT", bomb), END), png(header(4, 4), text, pixels(4, 4), END)):
        tracemalloc.start()
        with pytest.raises(RecordError, match="here: .png"):
            decode_png(data, "here")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(60), b"\xff\xd8\xff\xe0" + bytes(60),
        png(header(4, 4, depth=16), pixels(4, 4), END), png(header(4, 4, colour=6), pixels(4, 4), END),
        png(header(4, 4, colour=3), pixels(4, 4), END), png(header(4, 4, interlace=1), pixels(4, 4), END),
        png(header(4, 4), END), png(header(4, 4)), png(header(4, 4), chunk(b"IDAT", b"garbage"), END),
        png(header(4, 4), pixels(2, 4), END), png(header(4, 4), pixels(5, 4), END),
        png(header(4, 4), pixels(4, 4), END) + b"x", png(header(4, 4), pixels(4, 4), END, END),
        png(header(4, 4), pixels(4, 4)), png(header(4, 4), chunk(b"acTL", bytes(8)), pixels(4, 4), END),
    ],
)  # fmt: skip
def test_other_and_damaged_images_are_refused(data):
    with pytest.raises(RecordError, match="here: "):
        decode_png(data, "here")


def test_every_truncation_of_a_png_is_refused():
    image = image_of(6, 6)
    data = records.encode_png(image, "x")
    for length in range(len(data)):
        with pytest.raises(RecordError, match="here"):
            decode_png(data[:length], "here")


def test_every_flipped_bit_of_a_png_is_found():
    data = records.encode_png(image_of(3, 3), "x")
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(RecordError, match="here"):
            decode_png(bytes(damaged), "here")


def test_large_noise_image_in_several_chunks():
    image = image_of(300, 200)
    data = records.encode_png(image, "x")
    assert data.count(b"IDAT") > 1
    assert np.array_equal(decode_png(data, "here"), image)


def test_same_pixels_same_bytes():
    assert records.encode_png(image_of(), "x") == records.encode_png(image_of(), "x")
    assert rollout().to_members() == rollout().to_members()
