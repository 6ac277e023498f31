"""Proposer and Solver under ZeRO-3 on two ranks, on both tiny models; every launch serves several tests."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import ROOT, copy_run, open_scored_run, train_with
from tests.train.made_inquiries import ANSWERS, IMAGES, open_inquiry_run, write_and_score
from tests.train.test_training import distance, metrics_of
from unified_rl.backbones.base import Categorical
from unified_rl.backbones.load import load_backbone
from unified_rl.config import ConfigError, to_yaml
from unified_rl.ledger import Run
from unified_rl.policy.advantage import group_advantages
from unified_rl.policy.grpo import grpo_loss
from unified_rl.policy.reinforce import reinforce_loss
from unified_rl.records import RewardRecord, RolloutRecord
from unified_rl.runtime import EXIT_OK, EXIT_STOPPED, sample_seed
from unified_rl.shards import read_records, write_records
from unified_rl.train.batching import global_batches
from unified_rl.train.checkpoints import folder_of, read_checkpoint
from unified_rl.train.drawing import frozen_sha256
from unified_rl.train.export import export_checkpoint, main
from unified_rl.train.roles import load_data

pytestmark = pytest.mark.timeout(900)
FAMILIES = ("janus", "bagel")
ROLES = ("proposer", "solver")


def adapter_of(run: Run, role: str, iteration: int = 0) -> dict[str, torch.Tensor]:
    return load_file(run.policy_folder(iteration) / role / "adapter_model.safetensors")


def policy_files(run: Run, iteration: int) -> dict[str, bytes]:
    folder = run.policy_folder(iteration)
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Iteration 0 on two ranks, and on one; iteration 1 written and scored by the policy of iteration 0."""
    folder = tmp_path_factory.mktemp("roles")
    settings = json.loads((ROOT / "ds_configs/zero3_cpu.json").read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = 2  # a second copy of the weights; see Zero3Engine.close
    (folder / "hpz.json").write_text(json.dumps(settings))
    runs = {
        "janus": open_inquiry_run(folder / "janus", "janus"),
        "bagel": open_inquiry_run(folder / "bagel", "bagel", f"train.ds_config={folder}/hpz.json"),
    }
    for family in FAMILIES:
        runs[f"{family}-one"] = copy_run(runs[family], folder / f"{family}-one")
    assert train_with(2, folder / "codes", *(f"{runs[f].path}:0" for f in FAMILIES)) == [EXIT_OK] * 2
    assert train_with(1, folder / "codes", *(f"{runs[f'{f}-one'].path}:0" for f in FAMILIES)) == [EXIT_OK] * 2
    write_and_score(runs["janus"], 1)
    return runs


@pytest.fixture(scope="module")
def resumed(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Iteration 1 of the Janus: straight, stopped within the Proposer and behind it, killed in the Solver and later."""
    folder = tmp_path_factory.mktemp("resumed")
    runs = {name: copy_run(runs["janus"], folder / name) for name in ("straight", "stopped", "between")}
    codes = train_with(
        2, folder / "codes",
        f"{runs['straight'].path}:1", f"{runs['stopped'].path}:1:stop", f"{runs['between'].path}:1:late",
    )  # fmt: skip
    assert codes == [EXIT_OK, EXIT_STOPPED, EXIT_STOPPED]
    found = [[read_checkpoint(runs[n], 1, r) is not None for r in ROLES] for n in ("stopped", "between")]
    assert found == [[False, False], [True, False]]
    for name in ("solver", "marked"):
        runs[name] = copy_run(runs["straight"], folder / name)
        (runs[name].path / "iter_0001/train/manifest.json").unlink()
        shutil.rmtree(runs[name].policy_folder(1))
    killed = runs["solver"]  # its checkpoint is half there, its metrics are, and a policy is half copied
    (folder_of(killed, 1, "solver") / "COMPLETE").unlink()
    (killed.policy_folder(1) / "generator").mkdir(parents=True)
    codes = train_with(2, folder / "codes", *(f"{runs[n].path}:1" for n in ("stopped", "between", "solver", "marked")))
    assert codes == [EXIT_OK] * 4
    return runs


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_gives_the_same_updates(runs, family):
    for role in ROLES:
        two, one = adapter_of(runs[family], role), adapter_of(runs[f"{family}-one"], role)
        assert distance(one, two) <= 1e-6
        assert any(bool(value.any()) for name, value in two.items() if ".lora_B." in name)
    for row, expected in zip(metrics_of(runs[f"{family}-one"]), metrics_of(runs[family]), strict=True):
        assert row.pop("role") == expected.pop("role")
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_update_reaches_its_own_adapter_and_nothing_else(runs, family):
    run = runs[family]
    backbone = load_backbone(run.config.backbone)
    before = frozen_sha256(backbone.model, [])
    base = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    backbone.load_roles(run.policy_folder(0))
    assert sorted(backbone.adapters) == ["proposer", "solver"]
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in backbone.model.state_dict().items()}
    assert {name for name in after if "lora_" not in name} == base.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())
    for role in ROLES:
        assert read_checkpoint(run, 0, role).frozen_sha256 == before
        files = sorted(folder_of(run, 0, role).glob("*model_states.pt"))
        stored = [torch.load(file, weights_only=False)["module"] for file in files]
        names = {name for part in stored for name in part}
        assert names and all(f".{role}." in name for name in names)
    proposer, solver = (adapter_of(run, role) for role in ROLES)
    assert distance(proposer, solver) > 1e-3  # two different lessons from the same beginning


def replayed(run, role, samples):
    """Mask, log-probs and divergence of texts under the weights that wrote them, by the whole model."""
    backbone = load_backbone(run.config.backbone)
    settings = run.config.self_consistency
    temperature = settings.proposer_temperature if role == "proposer" else settings.solver_temperature
    backbone.add_lora(4, 8, role)
    width = max(len(s.ids) for s in samples)
    ids, mask = torch.zeros(len(samples), width, dtype=torch.long), torch.zeros(len(samples), width)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)], mask[row, : len(sample.ids)] = sample.ids, 1
    for name in backbone.trainable_names("lora"):
        backbone.model.get_parameter(name).requires_grad_()
    inputs = [s.image for s in samples], [s.question for s in samples], ids, mask
    logits = backbone.answer_logits(*inputs) / temperature
    with torch.no_grad(), backbone.role(None):
        reference = backbone.answer_logits(*inputs) / temperature
    log_probs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return backbone, mask, log_probs, Categorical(logits).kl(Categorical(reference))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", ROLES)
def test_first_step_equals_plain_pytorch(runs, family, role):
    """Loss and norm of the gradient of the first global batch, by one process on whole weights."""
    run = runs[family]
    data = load_data(run, 0, role)
    order = global_batches(range(len(data.groups)), 2, [sample_seed(run.config.seed, 0, f"order-{role}", 0)])
    samples = [data.samples[i] for group in order[0] for i in data.groups[group]]
    backbone, mask, log_probs, kl = replayed(run, role, samples)
    rewards = torch.tensor([s.reward for s in samples])
    if role == "proposer":
        advantages, _ = group_advantages(rewards.view(2, -1))
        loss, _ = grpo_loss(log_probs, log_probs.detach(), kl, advantages.flatten(), mask, 0.2, 0.2, 0.01)
    else:
        loss, _ = reinforce_loss(log_probs, rewards - data.reward_mean, mask, kl, 0.01)  # where the baseline begins
    loss.mean().backward()
    norm = torch.stack([p.grad.norm() for p in backbone.model.parameters() if p.grad is not None]).norm()
    row = next(row for row in metrics_of(run) if row["role"] == role)
    assert row[f"{role}/loss"] == pytest.approx(loss.mean().item(), rel=1e-4, abs=1e-6)
    assert row[f"{role}/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert row[f"{role}/ratio/initial_max_deviation"] <= 1e-3  # tokens as they were sampled, framing included
    assert row[f"{role}/kl"] < 1e-9  # the base model is the reference


@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_and_manifest(runs, family):
    run = runs[family]
    rows = metrics_of(run)
    assert [(row["role"], row["step"]) for row in rows] == [
        ("proposer", 1), ("proposer", 2), ("solver", 1), ("solver", 2),
    ]  # fmt: skip
    common = {"loss", "reward", "kl", "kl_coefficient", "grad_norm", "entropy", "lr", "ratio/max_deviation"}
    for row in rows:
        assert {f"{row['role']}/{name}" for name in common} <= row.keys()
        assert all(name.startswith(f"{row['role']}/") for name in row.keys() - {"role", "iteration", "step"})
    assert [row["solver/lr"] for row in rows[2:]] == [2e-3] * 2 and rows[0]["proposer/lr"] == 1e-3
    start = load_data(run, 0, "solver").reward_mean
    assert rows[2]["solver/baseline"] == pytest.approx(start) and start != 0
    assert rows[3]["solver/baseline"] == pytest.approx(0.6 * start + 0.4 * rows[2]["solver/reward"])
    assert rows[3]["solver/kl"] > 0 and rows[3]["solver/kl_coefficient"] != rows[2]["solver/kl_coefficient"]
    manifest = run.manifest(0, "train")
    assert manifest.counts == {
        "proposer_groups_used": IMAGES, "proposer_groups_zero_std": 0, "proposer_groups_failed": 0,
        "proposer_texts": 3 * IMAGES, "proposer_steps": 2,
        "solver_groups_used": 3, "solver_groups_skipped": 1, "solver_groups_failed": 0,
        "solver_texts": 3 * ANSWERS - 1, "solver_steps": 2, "steps": 4,
    }  # fmt: skip
    assert manifest.extra["solver_checkpoint"] == "checkpoints/solver/iter_0000"
    assert manifest.extra["proposer_reward_mean"] == pytest.approx(load_data(run, 0, "proposer").reward_mean)
    stored = read_checkpoint(run, 0, "solver")
    assert stored.state["baseline"]["value"] != 0 and stored.role == "solver"
    assert list((run.path / "tensorboard").glob("events*"))


def test_second_iteration_continues_each_role(resumed):
    run = resumed["straight"]
    rows = metrics_of(run, 1)
    assert [(row["role"], row["step"]) for row in rows] == [
        ("proposer", 3), ("proposer", 4), ("solver", 3), ("solver", 4),
    ]  # fmt: skip
    for role, row in zip(ROLES, (rows[0], rows[2]), strict=True):
        assert row[f"{role}/ratio/initial_max_deviation"] <= 1e-3 and row[f"{role}/kl"] > 1e-9
        assert row[f"{role}/kl_coefficient"] == read_checkpoint(run, 0, role).state["controller"]["coefficient"]
    assert rows[2]["solver/baseline"] == read_checkpoint(run, 0, "solver").state["baseline"]["value"]
    version = json.loads((run.path / "iter_0001/train/manifest.json").read_text())["policy_version"]
    assert version == run.current_policy(1)[1] != run.current_policy(2)[1]


@pytest.mark.parametrize("name", ["stopped", "between", "solver", "marked"])
def test_interrupted_equals_uninterrupted(resumed, name):
    run, straight = resumed[name], resumed["straight"]
    assert policy_files(run, 1) == policy_files(straight, 1)
    assert metrics_of(run, 1) == metrics_of(straight, 1)
    assert run.manifest(1, "train") == straight.manifest(1, "train")
    for role in ROLES:
        assert read_checkpoint(run, 1, role) == read_checkpoint(straight, 1, role)


def test_generator_learns_as_without_roles(random_janus_folder, tmp_path):
    """The same images and scores in a generation iteration: the same adapter, byte for byte, in its own folder."""
    lora = ["train.scope=lora", "train.lora.rank=4", "train.lora.alpha=8", "rollout.groups_per_shard=6"]
    plain = open_scored_run(tmp_path / "plain", random_janus_folder, *lora)
    config = replace(
        plain.config,
        data=replace(plain.config.data, images="unread"),
        reward=replace(plain.config.reward, method="self_consistency"),
        self_consistency=replace(plain.config.self_consistency, understanding=0),
    )
    (tmp_path / "roles").mkdir()
    (tmp_path / "roles/config.yaml").write_text(to_yaml(config))
    run = Run(tmp_path / "roles", config)
    for stage, kind in (("rollout", RolloutRecord), ("reward", RewardRecord)):
        manifest = plain.manifest(0, stage)
        records = list(read_records(plain.stage_folder(0, stage), manifest, kind))
        for record in records if stage == "rollout" else ():
            record.prompt.metadata = {"image_id": "x", "quality": 1.0, "pairs": [["is it red?", "yes"]]}
        info = write_records(run.stage_folder(0, stage) / "shard-00000.tar", records)
        run.commit(replace(manifest, shards=[info], config_hash=run.config_hash))
    assert train_with(1, tmp_path / "codes", f"{plain.path}:0", f"{run.path}:0") == [EXIT_OK] * 2
    adapter = "adapter_model.safetensors"
    folder = run.policy_folder(0)
    assert [f.name for f in folder.iterdir()] == ["generator"]
    assert (folder / "generator" / adapter).read_bytes() == (plain.policy_folder(0) / adapter).read_bytes()
    assert [{k: v for k, v in row.items() if k != "role"} for row in metrics_of(run)] == metrics_of(plain)
    assert run.manifest(0, "train").counts == plain.manifest(0, "train").counts
    assert run.current_policy(1)[1] != plain.current_policy(1)[1]
    assert read_checkpoint(run, 0, "generator").role == "generator"


def test_export_names_the_role_where_it_must(runs, tmp_path):
    run = runs["janus"]
    base = load_backbone(run.config.backbone).model.state_dict()
    export_checkpoint(run, tmp_path / "solver", 0)  # no Generator yet: nothing to choose
    assert main(["--run", str(run.path), "--out", str(tmp_path / "proposer"), "--role", "proposer"]) == EXIT_OK
    with pytest.raises(ConfigError, match="no adapter of generator"):
        export_checkpoint(run, tmp_path / "generator", 0, "generator")
    for role in ROLES:
        merged = merged_weights(run, tmp_path / role)
        changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
        expected = {n.split("base_model.model.")[1].split(".lora_")[0] + ".weight" for n in adapter_of(run, role)}
        assert merged.keys() == base.keys() and changed == expected


def merged_weights(run: Run, folder: Path) -> dict[str, torch.Tensor]:
    run.config.backbone.path, path = str(folder), run.config.backbone.path
    try:
        return load_backbone(run.config.backbone).model.state_dict()
    finally:
        run.config.backbone.path = path


@pytest.mark.parametrize("family", FAMILIES)
def test_solver_and_generator_are_merged_where_they_do_not_meet(runs, tmp_path, family):
    run = copy_run(runs[family], tmp_path / "run")
    generator = load_backbone(run.config.backbone)
    generator.add_lora(4, 8, "generator")
    for name in generator.trainable_names("lora"):
        generator.model.get_parameter(name).data += 0.01
    generator.save_policy(run.policy_folder(0) / "generator", "lora")
    if family == "janus":
        with pytest.raises(ConfigError, match="solver and generator change the same weights.*--role"):
            export_checkpoint(run, tmp_path / "both", 0)
        export_checkpoint(run, tmp_path / "one", 0, "generator")
        return
    for name, role in (("both", None), ("solver", "solver"), ("generator", "generator")):
        export_checkpoint(run, tmp_path / name, 0, role)
    both, solver, drawing = (merged_weights(run, tmp_path / name) for name in ("both", "solver", "generator"))
    base = load_backbone(run.config.backbone).model.state_dict()
    for name, tensor in base.items():
        expected = drawing[name] if torch.equal(solver[name], tensor) else solver[name]
        assert torch.equal(both[name], expected)
    assert any(not torch.equal(both[n], solver[n]) for n in base) and any(
        not torch.equal(both[n], drawing[n]) for n in base
    )
