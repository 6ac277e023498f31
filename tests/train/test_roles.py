from pathlib import Path

import pytest

from unified_rl.config import RunConfig
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest
from unified_rl.train.roles import carry_over, last_trained, policy_digest, roles_of, samples_per_step
from unified_rl.train.stage import store_metrics


def config_of(method: str = "self_consistency", **settings: object) -> RunConfig:
    config = RunConfig(iterations=6)
    config.backbone.path = config.data.prompts = "x"
    config.reward.method = method
    for name, value in settings.items():
        setattr(config.self_consistency, name, value)
    return config


def test_roles_take_turns_and_continue_from_their_own_last_iteration():
    config = config_of()
    text = ("proposer", "solver")
    assert [roles_of(config, k) for k in range(6)] == [text, text, text, ("generator",), ("generator",), text]
    assert [last_trained(config, k, "solver") for k in range(6)] == [-1, 0, 1, 2, 2, 2]
    assert [last_trained(config, k, "generator") for k in (3, 4, 8)] == [-1, 3, 4]
    assert roles_of(config_of(train_proposer=False), 0) == ("solver",)
    assert last_trained(config_of(train_proposer=False), 1, "proposer") == -1


def test_other_methods_have_one_nameless_role():
    config = config_of("gvu")
    assert roles_of(config, 4) == ("",) and last_trained(config, 4, "") == 3 and last_trained(config, 0, "") == -1


def test_steps_have_the_size_of_their_role():
    config = config_of(questions=3, answers=7, solver_groups_per_step=5)
    config.train.groups_per_step, config.rollout.group_size = 4, 6
    sizes = {role: samples_per_step(config, role) for role in ("", "proposer", "solver", "generator")}
    assert sizes == {"": (4, 6), "proposer": (4, 3), "solver": (5, 7), "generator": (4, 6)}


def write_policy(run: Run, iteration: int, role: str, content: bytes) -> Path:
    folder = run.policy_folder(iteration) / role
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder / "adapter_model.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Iteration 2 is committed with two roles; iteration 3 has trained the third."""
    run = Run(tmp_path, config_of())
    for role in ("proposer", "solver"):
        write_policy(run, 2, role, role.encode())
    digest = policy_digest(run.policy_folder(2))
    run.commit(Manifest("train", 2, [], "x", run.config_hash, {}, [], {"policy_sha256": digest}))
    write_policy(run, 3, "generator", b"drawing")
    return run


def test_policy_is_whole_after_every_iteration(run):
    half = run.policy_folder(3) / "solver"
    half.mkdir()
    (half / "adapter_config.json").write_text("half of an earlier attempt")
    carry_over(run, 3)
    for role in ("proposer", "solver"):
        before, after = (run.policy_folder(k) / role / "adapter_model.safetensors" for k in (2, 3))
        assert after.samefile(before)  # no second copy on the disk
    assert (half / "adapter_config.json").read_text() == "{}"
    assert (run.policy_folder(3) / "generator/adapter_model.safetensors").read_bytes() == b"drawing"


def test_file_systems_without_links_get_copies(run, monkeypatch):
    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    carry_over(run, 3)
    copy = run.policy_folder(3) / "solver/adapter_model.safetensors"
    assert copy.read_bytes() == b"solver" and not copy.samefile(run.policy_folder(2) / "solver" / copy.name)


def test_digest_names_all_roles(run):
    carry_over(run, 3)
    whole = policy_digest(run.policy_folder(3))
    assert whole != policy_digest(run.policy_folder(2)) and len(whole) == 64
    file = run.policy_folder(3) / "generator/adapter_model.safetensors"
    file.write_bytes(b"other")
    assert policy_digest(run.policy_folder(3)) != whole


def test_metrics_of_a_role_that_is_trained_again_where_the_stage_was_deleted(run: Run):
    store_metrics(run, 2, "solver", [{"role": "solver", "step": 0}])
    path = run.stage_folder(2, "train") / "metrics.jsonl"
    assert path.read_text() == '{"role": "solver", "step": 0}\n'
    path.write_text('{"role": "proposer", "step": 0}\n{"role": "solver", "step": 9}\n')
    store_metrics(run, 2, "solver", [{"role": "solver", "step": 0}])
    assert path.read_text() == '{"role": "proposer", "step": 0}\n{"role": "solver", "step": 0}\n'
