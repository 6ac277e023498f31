"""Configuration: what is wrong is refused with the key and the remedy, and a run keeps what it was started with."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from unified_rl.config import (
    RECIPES,
    ConfigError,
    RunConfig,
    checkpoint_path,
    config_hash,
    keys_of,
    load_run_config,
    loop_of,
    nearest_key,
    open_run,
    resolve,
    to_yaml,
)
from unified_rl.config_checks import CHOICES
from unified_rl.launching import config_value
from unified_rl.reward.answers import ANSWER_RULES
from unified_rl.reward.fidelity import GENERATION_RULES
from unified_rl.reward.role_rewards import PROPOSER_RULES, SOLVER_RULES
from unified_rl.reward.self_consistency_prompts import FRAMINGS
from unified_rl.reward.srum_prompts import WORDINGS
from unified_rl.reward.token_entropy import ENTROPY_RULES
from unified_rl.reward.votes import AGREEMENT_RULES

RECIPE = "gvu_janus_shapes"


def recipe(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text("backbone: {path: x}\ndata: {prompts: y}\n" + text)
    return str(path)


# ---- recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_resolves_once_paths_are_given(path: Path) -> None:
    images = ["data.images=z"] if path.stem.startswith("self_consistency") else []
    config = resolve(path.stem, ["backbone.path=x", "data.prompts=y", *images])
    assert isinstance(config, RunConfig)


def test_unset_values_are_the_defaults_of_the_dataclasses(tmp_path: Path) -> None:
    config = resolve(recipe(tmp_path, "seed: 5\n"))
    default = RunConfig()
    assert config.seed == 5
    assert (config.rollout, config.policy, config.train) == (default.rollout, default.policy, default.train)


def test_later_parents_and_the_recipe_itself_win(tmp_path: Path) -> None:
    first = recipe(tmp_path, "seed: 1\niterations: 10\ntrain: {ranks: 2}\n", "first.yaml")
    second = recipe(tmp_path, "seed: 2\ntrain: {epochs: 3}\n", "second.yaml")
    config = resolve(recipe(tmp_path, f"extends: [{first}, {second}]\niterations: 30\n"), ["train.epochs=4"])
    assert (config.seed, config.iterations, config.train.ranks, config.train.epochs) == (2, 30, 2, 4)


def test_a_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean gvu_janus_shapes"):
        resolve("gvu_janus_shape")
    with pytest.raises(ConfigError, match="recipe file none.yaml does not exist"):
        resolve("none.yaml")


def test_values_without_a_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"no value for backbone\.path, data\.prompts"):
        resolve("gvu")


# ---- wrong input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.learningrate=1e-5", "train.learning_rate"),
        ("train.rank=4", "train.ranks"),
        ("group_size=4", "rollout.group_size"),
        ("train.group_size=4", "rollout.group_size"),
        ("rollout.temprature=2", "rollout.temperature"),
        ("policy.clip_hi=0.1", "policy.clip_high"),
        ("sed=3", "seed"),
    ],
)
def test_an_unknown_key_names_itself_and_the_nearest(override: str, nearest: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(ConfigError, match="unknown key") as caught:
        resolve(RECIPE, [override])
    assert nearest_key(key) == nearest
    assert override in str(caught.value)
    if "." in key:
        assert str(caught.value).endswith(f"unknown key {key}; the nearest valid key is {nearest}")


def test_an_unknown_key_in_a_recipe_names_the_file(tmp_path: Path) -> None:
    path = recipe(tmp_path, "train: {lerning_rate: 1.0}\n")
    with pytest.raises(ConfigError, match="unknown key train.lerning_rate.*train.learning_rate") as caught:
        resolve(path)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "seed=abc",
        "iterations=1.5",
        "train.learning_rate=fast",
        "train.activation_checkpointing=maybe",
        "train.activation_checkpointing=1.5",
        "rollout.group_size=",
    ],
)
def test_a_wrong_type_names_the_key(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0].replace(".", r"\.")):
        resolve(RECIPE, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_size=1", "rollout.group_size=1 must be at least 2"),
        ("iterations=0", "iterations=0 must be at least 1"),
        ("train.ranks=0", "train.ranks=0 must be at least 1"),
        ("rollout.temperature=0", "rollout.temperature=0.0 must be above 0"),
        ("rollout.temperature=nan", "rollout.temperature=nan must be above 0"),
        ("train.learning_rate=-1", "train.learning_rate=-1.0 must be above 0"),
        ("policy.clip_low=1", "policy.clip_low=1.0 must be below 1"),
        ("reward.max_failed_share=1.5", "reward.max_failed_share=1.5 must lie in 0..1"),
        ("policy.control=constant", "policy.control=constant is a control of policy.objective=reward_weighted"),
        ("rollout.think=true", "janus cannot draw from a written plan"),
        ("reward.srum.regions=boxes", "reward.srum.regions=boxes is not one of grid, components, sam, file"),
        ("reward.srum.regions=sam", "reward.srum.sam_path='' and reward.srum.regions=sam do not fit"),
        ("reward.srum.boxes_file=x", "reward.srum.boxes_file='x' and reward.srum.regions=grid do not fit"),
        ("reward.srum.grid_rows=200", "a grid of 200 x 2 has over 256 cells"),
        ("reward.srum.retries=-1", "reward.srum.retries=-1 must be at least 0"),
        ("reward.srum.retry_temperature=inf", "reward.srum.retry_temperature=inf must be above 0 and finite"),
        ("policy.reference_weight=nan", "policy.reference_weight=nan must be at least 0"),
        ("reward.judge=alive", "reward.judge=alive is not one of frozen, live"),
        ("train.scope=all", "train.scope=all is not one of lora, full"),
        ("backbone.dtype=float8", "backbone.dtype=float8 is not one of float32, bfloat16"),
    ],
)
def test_impossible_values_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(RECIPE, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "not of the form key=value"),
        ("train=3", "train is a section"),
        ("train.lora=3", "train.lora is a section"),
    ],
)
def test_malformed_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(RECIPE, [override])


def test_every_key_is_reachable_and_overridable() -> None:
    keys = keys_of(RunConfig)
    assert len(keys) == len(set(keys))
    assert {"seed", "train.lora.rank", "evaluate.prompts"} <= set(keys)
    config = resolve(RECIPE)
    same = [f"{key}={config_value(config, key)}" for key in keys]
    assert to_yaml(resolve(RECIPE, same)) == to_yaml(config)


# ---- the run folder -----------------------------------------------------------------------------------------------


def test_a_run_stores_its_configuration_once(tmp_path: Path) -> None:
    created = open_run(tmp_path / "run", RECIPE, ["seed=9"])
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    assert open_run(tmp_path / "run") == created
    assert open_run(tmp_path / "run", RECIPE, ["seed=9"]) == created
    assert load_run_config(tmp_path / "run") == created
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_another_configuration_is_refused_with_a_diff(tmp_path: Path) -> None:
    open_run(tmp_path / "run", RECIPE)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        open_run(tmp_path / "run", RECIPE, ["seed=9", "train.epochs=2"])
    lines = str(caught.value).splitlines()
    changed = [line for line in lines[1:] if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert changed == ["-seed: 1234", "+seed: 9", "-  epochs: 1", "+  epochs: 2"]
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_overrides_of_a_stored_run_need_the_recipe(tmp_path: Path) -> None:
    open_run(tmp_path / "run", RECIPE)
    with pytest.raises(ConfigError, match="overrides seed=9 need --recipe"):
        open_run(tmp_path / "run", None, ["seed=9"])


def test_a_new_run_needs_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe is given"):
        open_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_refused_configuration_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        open_run(tmp_path / "run", RECIPE, ["iterations=0"])
    assert not (tmp_path / "run").exists()


def test_an_edited_configuration_is_checked(tmp_path: Path) -> None:
    open_run(tmp_path / "run", RECIPE)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("group_size: 8", "group_size: 1"))
    with pytest.raises(ConfigError, match="rollout.group_size=1 must be at least 2"):
        load_run_config(tmp_path / "run")


def test_the_hash_follows_every_value() -> None:
    config = resolve(RECIPE)
    assert config_hash(config) == config_hash(resolve(RECIPE))
    assert config_hash(replace(config, seed=1)) != config_hash(config)
    assert config_hash(replace(config, train=replace(config.train, beta2=0.95))) != config_hash(config)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json is missing"):
        checkpoint_path(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_path(str(tmp_path)) == tmp_path


# ---- entry points -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["rollout", "reward", "train", "evaluation"])
def test_every_stage_takes_overrides_and_refuses_unknown_keys(stage: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"unified_rl.{stage}", "--run", str(tmp_path / "run"), "--iteration", "0"]
    command += ["--recipe", RECIPE, "train.learningrate=1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2, result.stderr
    assert "unknown key train.learningrate; the nearest valid key is train.learning_rate" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_flows_need_noise_for_grpo_and_know_no_temperature() -> None:
    flow = ["backbone.family=bagel", "backbone.path=x", "data.prompts=x"]
    with pytest.raises(ConfigError, match="rollout.flow.eta=0 draws by the ODE"):
        resolve("gvu", [*flow, "rollout.flow.eta=0"])
    with pytest.raises(ConfigError, match="rollout.temperature=0.9: bagel has none"):
        resolve("gvu", [*flow, "rollout.temperature=0.9"])
    resolve("gvu", [*flow, "rollout.flow.eta=0", "policy.objective=reward_weighted"])


def test_nothing_behind_the_equals_sign_is_the_empty_text() -> None:
    assert resolve(RECIPE, ["evaluate.prompts="]).evaluate.prompts == ""


# ---- Ask-Solve-Generate -------------------------------------------------------------------------------------------

THREE_ROLES = ("self_consistency_janus_shapes", ["data.images=somewhere"])


def with_roles(*overrides: str) -> RunConfig:
    return resolve(THREE_ROLES[0], [*THREE_ROLES[1], *overrides])


def test_loops_alternate() -> None:
    config = with_roles()
    loops = [loop_of(config, k) for k in range(10)]
    assert loops == (["understanding"] * 3 + ["generation"] * 2) * 2
    alone = with_roles("self_consistency.understanding=0")
    assert {loop_of(alone, k) for k in range(5)} == {"generation"}
    alone = with_roles("self_consistency.generation=0")
    assert {loop_of(alone, k) for k in range(5)} == {"understanding"}
    assert loop_of(resolve(RECIPE), 0) == ""


def test_three_roles_need_images_and_no_prompts(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: [self_consistency]\nbackbone: {path: x}\ndata: {images: y}\n")
    assert resolve(str(mine)).data.prompts == ""
    with pytest.raises(ConfigError, match="no value for data.images"):
        resolve(str(mine), ["data.images="])
    imageless = "self_consistency.imageless=true"
    assert resolve(str(mine), [imageless, "data.prompts=z"]).data.prompts == "z"
    with pytest.raises(ConfigError, match="no value for data.prompts"):
        resolve(str(mine), [imageless])
    with pytest.raises(ConfigError, match="reward.method=gvu draws data.prompts"):
        resolve(RECIPE, ["data.images=y"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("self_consistency.preset=evolm", "is not one of self_consistency"),
        ("self_consistency.wording=short", "is not one of full, brief"),
        ("self_consistency.references=0", "must be at least 1"),
        ("self_consistency.answers=1", "a vote needs at least 2"),
        ("self_consistency.fidelity_samples=0", "must be at least 1"),
        ("self_consistency.questions=1", "must be at least 2"),
        ("self_consistency.solver_top_p=0", "must lie in 0..1"),
        ("self_consistency.max_token_entropy=0", "must be above 0; .inf for no limit"),
        ("self_consistency.max_token_entropy=nan", "must be above 0; .inf for no limit"),
        ("self_consistency.hard_share=1.5", "must lie in 0..1"),
        ("self_consistency.min_pairs=4", "more than the 3 pairs"),
        ("self_consistency.proposer_temperature=0", "must be above 0"),
        ("self_consistency.kl_target=.inf", "must be above 0 and finite"),
        ("train.scope=full", "set train.scope=lora"),
    ],
)
def test_impossible_settings_of_three_roles(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_roles(override)


def test_there_is_no_loop_without_iterations() -> None:
    with pytest.raises(ConfigError, match="nothing is left to do"):
        with_roles("self_consistency.understanding=0", "self_consistency.generation=0")


def test_the_configuration_names_the_presets_and_wordings_that_exist() -> None:
    assert CHOICES["self_consistency.wording"] == WORDINGS
    tables = (ENTROPY_RULES, AGREEMENT_RULES, PROPOSER_RULES, SOLVER_RULES, GENERATION_RULES, ANSWER_RULES)
    for rules in tables:
        assert tuple(rules) == CHOICES["self_consistency.preset"]
    assert set(FRAMINGS) == set(WORDINGS)
