"""What unified_rl.memory says of the train stage against what real steps take."""

from pathlib import Path

import pytest

from tests.train.conftest import PROMPTS, open_scored_run, run_ranks
from unified_rl.disk import expected
from unified_rl.memory import network, train_memory
from unified_rl.runtime import set_cpu_threads

BIG = ["train.groups_per_step=3", "train.micro_batch=12"]
CASES = {
    "janus-full": ("janus", ["train.scope=full"]),
    "janus-full-recomputed": ("janus", ["train.scope=full", "train.activation_checkpointing=1"]),
    "janus-lora": ("janus", ["train.scope=lora", "train.lora.rank=8"]),
    "bagel-full": ("bagel", ["train.scope=full"]),
    "bagel-full-recomputed": ("bagel", ["train.scope=full", "train.activation_checkpointing=1"]),
    "bagel-lora": ("bagel", ["train.scope=lora", "train.lora.rank=8"]),
}
TOLERANCE = 0.15
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, random_bagel_folder, janus_builder):
    """(run, bytes at the peak of its second optimiser step) of every case."""
    folder = tmp_path_factory.mktemp("memory")
    janus_builder(folder / "janus", width=192, num_hidden_layers=4)
    checkpoints = {"janus": folder / "janus", "bagel": random_bagel_folder}
    runs = {
        name: open_scored_run(
            folder / name, checkpoints[family], *BIG, "reward.domain=log", *overrides, recipe=f"gvu_{family}_shapes"
        )
        for name, (family, overrides) in CASES.items()
    }  # fmt: skip
    found = run_ranks(1, "memory_driver.py", folder / "out", *(str(run.path) for run in runs.values()))[0]
    return {name: (runs[name], found[i]) for i, name in enumerate(runs)}


def prompt_tokens(checkpoint: Path) -> int:
    """Tokens in front of the first image token: the longest prompt, in its template."""
    from unified_rl.backbones.load import FAMILIES
    from unified_rl.memory import family_of

    backbone = FAMILIES[family_of(str(checkpoint))].from_pretrained(checkpoint)
    if backbone.family == "janus":
        return backbone.inputs.drawing(PROMPTS)[0].shape[1]
    return max(sum(len(text.ids) for text in backbone.inputs.drawing(prompt)) for prompt in PROMPTS)


@pytest.mark.parametrize("name", CASES)
def test_estimate_is_within_15_percent_of_a_real_step(measured, name):
    run, found = measured[name]
    set_cpu_threads(1)
    path = run.config.backbone.path
    memory = train_memory(network(path, "float32"), run.config, 1, prompt_tokens(Path(path)))
    print(f"{name}: measured {found / 2**20:.2f} MiB, estimated {memory.peak / 2**20:.2f} MiB, {memory}")
    assert memory.peak == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["janus-full", "bagel-full"])
def test_shards_stay_below_the_estimate_and_near_it(measured, name):
    run, _ = measured[name]
    for stage in ("rollout", "reward"):
        found = sum(shard.bytes for shard in run.require_manifest(0, stage).shards)
        assert 0.3 < found / getattr(expected(run.config), stage) <= 1, stage
