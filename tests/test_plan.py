"""Memory and time before a run, checked against numbers computed by hand."""

from dataclasses import replace

import pytest

from unified_rl.config import ConfigError, resolve
from unified_rl.memory import Memory, network, peak_bytes, reward_memory, rollout_memory, train_memory
from unified_rl.plan import Assumptions, Load, main, reward_seconds, rollout_seconds, train_seconds

GIB = 2**30


def config_of(recipe: str, *overrides: str):
    return resolve(recipe, ["backbone.path=x", "data.prompts=x", *overrides])


@pytest.mark.parametrize(
    ("model", "billions", "grid"),
    [("janus-pro-1b", 2.077, (24, 24)), ("janus-pro-7b", 7.408, (24, 24)), ("bagel-7b", 14.61, (64, 64))],
)
def test_public_sizes(model, billions, grid):
    net = network(model, "bfloat16")
    assert net.count() / 1e9 == pytest.approx(billions, abs=0.001 if "janus" in model else 0.01)
    assert net.grid == grid


def test_neither_a_name_nor_a_folder():
    with pytest.raises(ConfigError, match="not a checkpoint"):
        network("janus-pro-2b", "bfloat16")


def test_every_tensor_counts_until_it_is_gone():
    import torch

    layer = torch.nn.Linear(100, 100, bias=False, device="meta")

    def work():
        x = torch.zeros(10, 100, device="meta")  # 4,000 bytes, and as many for each product
        for _ in range(5):
            x = layer(x)
        return x.sum()

    layer.requires_grad_(False)
    assert peak_bytes(layer, work) == 8000  # one in, one out
    layer.requires_grad_(True)
    # Five inputs are kept for the backward pass; then a gradient of the weight comes on top of the output's.
    assert peak_bytes(layer, work) >= 5 * 4000 + 40_000
    assert layer.weight.grad is None


def test_keys_and_values_by_hand():
    """Janus-Pro-1B: 24 layers x 16 heads x 128, keys and values, bf16, 576 + 64 tokens, with and without the prompt."""
    config = config_of(
        "gvu_janus_pro_1b", "rollout.groups_per_batch=1", "rollout.group_size=3", "rollout.guidance_scale=5"
    )
    memory = rollout_memory(network("janus-pro-1b", "bfloat16"), config, 64)
    assert memory.cache == 3 * 2 * (24 * 16 * 128 * 2) * 2 * 640
    assert memory.weights == pytest.approx(2.077e9 * 2 + 0.072e9 * 2, rel=0.01)  # the image tokenizer is fp32


def trained(ranks: int, *overrides: str, device: str = "cpu") -> Memory:
    config = resolve(
        "gvu_janus_shapes", ["data.prompts=x", "train.micro_batch=8", f"backbone.device={device}", *overrides]
    )
    return train_memory(network("assets:tiny_janus", "float32"), config, ranks, 12)


def test_zero3_divides_everything_by_the_ranks():
    one, eight = trained(1), trained(8)
    numbers = network("assets:tiny_janus", "float32").train("full", (1, 1), recompute=False)
    assert one.optimizer == 12 * numbers
    assert one.gradients == 4 * numbers
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eight, part) == pytest.approx(getattr(one, part) / 8, rel=0.001)
    assert one.buffers == 4 * 2_000_000  # the bucket of zero3_cpu.json; one rank gathers nothing
    assert eight.buffers > one.buffers


def test_lora_and_recomputing_take_less():
    full, lora = trained(1), trained(1, "train.scope=lora")
    assert lora.optimizer < full.optimizer / 3
    large = trained(1, "train.micro_batch=64")
    assert trained(1, "train.micro_batch=64", "train.activation_checkpointing=1").peak < large.peak
    assert large.activations == pytest.approx(2 * trained(1, "train.micro_batch=32").activations, rel=0.05)


def test_offloading_takes_the_states_off_the_gpu():
    net, config = network("bagel-7b", "bfloat16"), config_of("srum_bagel_7b", "train.ds_config=zero3_bf16_offload")
    memory = train_memory(net, config, 8, 64)
    assert memory.optimizer == memory.gradients == 0
    assert memory.weights < GIB  # the autoencoder


def test_a_live_judge_is_a_second_copy():
    config = config_of("gvu_janus_pro_1b", "reward.batch_size=2")
    net = network("janus-pro-1b", "bfloat16")
    frozen = reward_memory(net, config, 64)
    live = reward_memory(net, replace(config, reward=replace(config.reward, judge="live")), 64)
    assert live.weights == 2 * frozen.weights


# Times of a model of 1e9 weights a token on GPUs of 100 TFLOP/s, 1000 GB/s and a network of 10 GB/s.
LOAD = Load(10**9, 10**9, 2 * 10**9, 10**8, cells=100, reading=50, step_bytes=0, flow=False)
GPU = Assumptions(100.0, 1000.0, 10.0, prompt_tokens=10, reply_tokens=5)
SIZES = ("data.prompts_per_iteration=8", "rollout.group_size=4", "rollout.groups_per_batch=2", "train.micro_batch=4")


def test_times_by_hand():
    config = config_of("gvu_janus_pro_1b", *SIZES, "train.scope=full")
    # Two batches on each of two GPUs; a token waits for 2 GB of weights.
    assert rollout_seconds(LOAD, config, 2, GPU) == pytest.approx(2 * 100 * 2e9 / 1e12)
    # 16 images a GPU, each read (70 tokens) and replayed (110).
    assert reward_seconds(LOAD, config, 2, GPU) == pytest.approx(16 * 2e9 * (70 + 110) / 1e14)
    # Three passes over 32 images on one GPU; on two, four micro-batches that gather 2 GB twice and reduce 0.2 GB.
    assert train_seconds(LOAD, config, 1, GPU) == pytest.approx(32 * 3 * 2e9 * 110 / 1e14)
    assert train_seconds(LOAD, config, 2, GPU) == pytest.approx(4 * (8e9 + 0.2e9) / 2 / 1e10)


def test_times_of_a_flow_by_hand():
    flow = replace(LOAD, flow=True)
    config = config_of("gvu_bagel_7b", *SIZES, "rollout.guidance_scale=1", "rollout.flow.steps=10")
    assert rollout_seconds(flow, config, 2, GPU) == pytest.approx(2 * 8 * 10 * 2e9 * 100 / 1e14)
    # Three decisions of an image at once; LoRA with recomputed layers passes forward twice and backward once.
    assert train_seconds(flow, config, 1, GPU) == pytest.approx(32 * 3 * 2e9 * 310 / 1e14)


def test_command(capsys):
    assert main(["--model", "assets:tiny_janus", "--recipe", "gvu_janus_shapes", "--gpus", "2", "seed=3"]) == 0
    out = capsys.readouterr().out
    assert "on 1 x 2 GPUs" in out
    lines = [line for line in out.splitlines() if line.startswith(("rollout", "reward", "train"))]
    assert len(lines) == 6
    assert sum("*" in line for line in lines) == 1
    assert "train full *" in out
    assert "assumed: tflops 300" in out


def test_a_recipe_that_asks_about_images_is_planned_without_them(capsys):
    assert main(["--model", "assets:tiny_janus", "--recipe", "self_consistency_janus_shapes", "data.images=none"]) == 0
    assert "train" in capsys.readouterr().out


def test_a_recipe_of_another_family_is_refused():
    with pytest.raises(ConfigError, match="recipe gvu_bagel_7b is for bagel"):
        main(["--model", "assets:tiny_janus", "--recipe", "gvu_bagel_7b"])


@pytest.mark.parametrize("argument", [["--gpus", "0"], ["--tflops", "-1"], ["--tflops", "nan"]])
def test_impossible_numbers_are_refused(argument, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "janus-pro-1b", *argument])
    assert argument[0] in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "make plan MODEL=bagel-7b" in capsys.readouterr().out
