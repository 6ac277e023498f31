import json

import pytest

from unified_rl.config import ConfigError, TrainConfig, resolve
from unified_rl.runtime import Ranks
from unified_rl.train import zero3
from unified_rl.train.stage import engine_config
from unified_rl.train.update import learning_rate
from unified_rl.train.zero3 import INJECTED, TrainError, load_ds_config

FILES = sorted(zero3.DS_CONFIGS.glob("*.json"))


def dtype_of(path):
    return "bfloat16" if "bf16" in path.stem else "float32"


def test_all_files_are_found():
    assert {p.stem for p in FILES} >= {"zero3_cpu", "zero3_bf16", "zero3_bf16_offload", "zero3_hpz8_bf16"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_deepspeed_accepts_every_file(path, monkeypatch):
    import deepspeed.runtime.config as ds

    class Eight:  # hpZ needs as many ranks as its partition
        def get_data_parallel_world_size(self):
            return 8

    monkeypatch.setattr(ds.dist, "get_rank", lambda: 0)
    config = load_ds_config(path.stem, dtype_of(path), 4, 3, 8, 1.0)
    read = ds.DeepSpeedConfig(config, mpu=Eight())
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (96, 4, 3)
    assert read.gradient_clipping == 1.0
    assert read.zero_config.stage == 3
    assert read.bfloat16_config.enabled == (dtype_of(path) == "bfloat16")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_leave_batches_and_optimizer_to_the_run(path):
    assert not set(INJECTED) & json.loads(path.read_text()).keys()


@pytest.mark.parametrize("key", INJECTED)
def test_a_file_that_sets_them_is_refused(key, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, key: 1}))
    with pytest.raises(ConfigError, match=f"mine.json sets {key}"):
        load_ds_config(str(path), "float32", 1, 1, 1, 1.0)


@pytest.mark.parametrize(
    "text, dtype, message",
    [
        ("{", "float32", "not valid JSON"),
        ('{"zero_optimization": {"stage": 2}}', "float32", "stage must be 3"),
        ('{"zero_optimization": {"stage": 3}}', "bfloat16", "computes in float32, backbone.dtype=bfloat16"),
        ('{"zero_optimization": {"stage": 3}, "fp16": {"enabled": true}}', "float32", "take another"),
    ],
)
def test_unfit_files_are_refused(text, dtype, message, tmp_path):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_ds_config(str(tmp_path / "mine.json"), dtype, 1, 1, 1, 1.0)


def test_unknown_name_lists_the_files():
    with pytest.raises(ConfigError, match="zero3_bf16_offload"):
        load_ds_config("zero4", "float32", 1, 1, 1, 1.0)


def test_several_ranks_need_an_address(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(TrainError, match="launch/train.sh"):
        zero3.init_process_group(Ranks(0, 0, 2), "cpu")


@pytest.mark.parametrize("world_size, accumulation", [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_batch_geometry_follows_the_run(world_size, accumulation):
    settings = ["backbone.path=x", "train.groups_per_step=8", "rollout.group_size=4", "train.micro_batch=8"]
    config = engine_config(resolve("gvu_janus_shapes", [*settings, "train.max_grad_norm=0.5"]), world_size)
    assert config["train_batch_size"] == 8 * accumulation * world_size
    assert config["gradient_accumulation_steps"] == accumulation
    assert config["gradient_clipping"] == 0.5


def test_warm_up_is_linear_then_constant():
    config = resolve("gvu_janus_shapes", ["backbone.path=x", "train.learning_rate=4e-4", "train.warmup_steps=4"])
    assert [learning_rate(i, config) for i in range(6)] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 4e-4])
    config.train = TrainConfig(warmup_steps=0, learning_rate=1.0)
    assert learning_rate(0, config) == 1.0
