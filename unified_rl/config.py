"""Typed run configuration: one dataclass field per tunable, strict loading, frozen per run.

A recipe is a YAML file in `unified_rl/recipes/` (or a path to one); `extends: [NAME, ...]` starts it from others,
later ones winning. It is merged into the dataclasses below, then `key=value` overrides are applied. Unknown keys,
wrong types and impossible combinations raise `ConfigError`. The resolved configuration is written once to
`RUN/config.yaml`.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from unified_rl.config_checks import ConfigError, check_config
from unified_rl.files import atomic_write_bytes

RECIPES = Path(__file__).parent / "recipes"
ASSETS = Path(__file__).parent / "assets"


@dataclass
class BackboneConfig:
    """Which checkpoint is trained, and how it is held in memory."""

    family: str = "janus"  # janus | bagel
    path: str = MISSING  # folder in Hugging Face layout, or `assets:NAME` for a checkpoint in the package
    dtype: str = "bfloat16"  # float32 | bfloat16
    attn_implementation: str = "auto"  # auto: flash_attention_2 on a GPU that has it, else sdpa
    device: str = "auto"  # auto: cuda where available, else cpu
    threads: int = 1  # CPU threads of each worker; part of the result on CPU, so it is configuration


@dataclass
class DataConfig:
    """What the run learns from: folders of shards with their manifests."""

    prompts: str = MISSING  # see data_tools/pack_prompts.py; not read by method self_consistency
    images: str = ""  # see data_tools/pack_images.py; of method self_consistency
    prompts_per_iteration: int = 64  # or images
    keep_rollouts: int = 0  # rollout and reward shards of so many trained iterations are kept; 0: of all


@dataclass
class FlowConfig:
    """How flow and diffusion backbones draw (`backbones/bagel/flow.py`); token backbones do not read it."""

    steps: int = 49  # evaluations of the velocity
    shift: float = 3.0  # above 1 spends more steps near the noise
    eta: float = 0.7  # noise of the SDE steps, which GRPO needs; 0 draws by the ODE
    sde_window: int = 0  # consecutive SDE steps of an image, placed by the group's seed; 0: all but the last step
    sde_before: int = 0  # the window ends at this step or earlier; 0: anywhere before the last step
    guidance_above: float = 0.4  # guidance acts at times in (above, up to]; 1 is noise
    guidance_up_to: float = 1.0
    renorm: str = "global"  # global | channel | none
    renorm_min: float = 0.0


@dataclass
class RolloutConfig:
    """Sampling of G images per prompt."""

    group_size: int = 8
    temperature: float = 1.0  # of token backbones
    guidance_scale: float = 1.0
    flow: FlowConfig = field(default_factory=FlowConfig)
    think: bool = False  # write a plan first, by the checkpoint's instruction, and draw from prompt and plan (BAGEL)
    plan_tokens: int = 1000  # a plan is cut off here
    groups_per_batch: int = 8  # prompts sampled together; G times as many images
    groups_per_shard: int = 32
    workers: int = 1  # processes on this machine; the images do not depend on it


@dataclass
class SrumConfig:
    """How SRUM's judge is asked about images and their regions, and how its answers are painted."""

    preset: str = "srum"  # srum: the paper; srum_release: what the published code computes
    regions: str = "grid"  # grid | components (areas of similar colour) | sam (Segment Anything) | file (the user's)
    grid_rows: int = 2
    grid_columns: int = 2
    boxes_file: str = ""  # JSONL of boxes by prompt, with regions=file (see docs/srum.md)
    sam_path: str = ""  # checkpoint folder, with regions=sam
    wording: str = "full"  # of the questions; brief: for models that were taught it
    with_reason: bool = True  # ask for a reason beside every region's score
    use_global: bool = True  # false: no question about the whole image, alpha is 1
    use_local: bool = True  # false: no question about regions, R is 1 everywhere
    think: bool = False  # let the judge plan before it answers
    think_instruction: str = ""  # empty: our own
    max_new_tokens_global: int = 1024  # longest reply, its plan included
    max_new_tokens_local: int = 4096
    retries: int = 4  # further attempts at a reply that could not be read, or not for all regions
    retry_temperature: float = 0.7


@dataclass
class RewardConfig:
    """Scores of the images under the judge."""

    # gvu: likelihood of the prompt (section 3.2) | srum: global and regional scores | self_consistency: three roles
    method: str = "gvu"
    srum: SrumConfig = field(default_factory=SrumConfig)
    judge: str = "frozen"  # frozen: the base weights; live: the policy that drew the images
    question: str = "Describe the image in detail."
    domain: str = "probability"  # probability: geometric mean; log: mean log-likelihood
    batch_size: int = 32
    workers: int = 1
    max_failed_share: float = 0.05  # of groups; above it the stage stops


@dataclass
class SelfConsistencyConfig:
    """Ask-Solve-Generate: what Proposer and Solver are asked, and how they learn; read by reward.method alone."""

    preset: str = "self_consistency"  # the paper; self_consistency_release: its code; evolmm: the parent method
    wording: str = "full"  # of all questions; brief: for models that were taught it
    understanding: int = 3  # iterations of a cycle in which Proposer and Solver learn; 0: the Generator alone
    generation: int = 2  # iterations after them in which the Generator learns; 0: never
    imageless: bool = False  # asked about are images that the Generator draws of data.prompts, not data.images
    questions: int = 3  # K that the Proposer writes on an image
    answers: int = 7  # N to a question, which vote; in its seven framings in turn
    token_entropy: bool = True  # false, a control: questions earn their agreement score alone, and no limit holds
    running_target: bool = False  # the vote entropy that is wanted follows those of the past, instead of .90
    train_proposer: bool = True  # false, a control: the Proposer stays as it is
    hard_share: float = 0.3  # of images asked about with difficulty hard; medium the rest
    min_majority: float = 0.0  # of the vote, that a question must have for the Solver to learn from it
    max_token_entropy: float = math.inf  # nats, of the greedy answer to a question that the Solver learns from
    penalise_unreadable: bool = True  # reply without a readable answer: as a minority of one; false: not learnt from
    references: int = 7  # answers to a check question on the real image, whose majority is the reference
    reference_share: float = 0.6  # of the vote that a reference must have
    pairs: int = 3  # check questions of a drawing task
    min_pairs: int = 2  # that must be reliable
    min_quality: float = 0.35  # of a drawing task
    task_retries: int = 2  # further attempts at a drawing task
    cycle_weight: float = 0.2  # of caption and drawing against the prompt; that of the check questions is .65
    image_term: str = "embedding"  # drawing against prompt; embedding: cosine; likelihood: of the prompt, as in GvU
    fidelity_samples: int = 1  # answers to a check question on a drawing; 1: greedy
    proposer_temperature: float = 1.0
    proposer_tokens: int = 384  # longest reply with a question
    task_tokens: int = 512  # longest reply with a drawing task
    solver_temperature: float = 0.7
    solver_top_p: float = 0.95
    solver_tokens: int = 96
    caption_tokens: int = 64
    solver_groups_per_step: int = 8  # questions, of N answers each, in one optimiser step of the Solver
    proposer_learning_rate: float = 1.0e-6
    solver_learning_rate: float = 1.0e-6  # the Generator has train.learning_rate
    kl_target: float = 0.02  # nats a token, to which Proposer's and Solver's coefficients are steered
    kl_rate: float = 0.1


@dataclass
class PolicyConfig:
    """The update: GRPO on the decisions that drew the images, or the images' own loss weighted by their reward."""

    objective: str = "grpo"  # grpo | reward_weighted
    std_eps: float = 1.0e-8
    min_std: float = 1.0e-6  # a group whose rewards spread less carries no signal and is skipped
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.03
    steps_per_update: int = 0  # grpo on flow: SDE steps of each image in one update, drawn anew each time; 0: all
    reference_weight: float = 0.5  # reward_weighted: lambda, pull towards the images as they are (SRUM eq. 3)
    min_weight: float = 0.0  # reward_weighted: floor of a cell's weight; -.inf is the paper, which pushes cells away
    advantage_limit: float = 2.0  # reward_weighted with one reward an image: advantage at which the map reaches 1
    flow_shift: float = 4.0  # reward_weighted on flow: shift of the times that are trained
    hidden_prompts: float = 0.0  # reward_weighted: share of images trained without their prompt, for guidance
    # Control runs. shuffled: rewards permuted over all images of the iteration; constant: every cell weighs 1.
    control: str = "none"


@dataclass
class LoraConfig:
    """Low-rank adapters on the language model (peft); used when train.scope is lora."""

    rank: int = 32
    alpha: int = 64


@dataclass
class TrainConfig:
    """ZeRO-3 policy update."""

    ranks: int = 1  # processes on this machine (GPUs); the global batch does not depend on it
    scope: str = "lora"  # lora | full (language model and image head)
    lora: LoraConfig = field(default_factory=LoraConfig)
    ds_config: str = "zero3_bf16"  # a file of ds_configs/, or a path
    learning_rate: float = 2.0e-5
    warmup_steps: int = 20
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    groups_per_step: int = 8  # groups (of G images, of K replies) in one optimiser step, over all ranks
    epochs: int = 1  # passes over the iteration's groups; the Solver makes one
    micro_batch: int = 8  # images or texts per forward on each rank
    old_log_probs: str = "rollout"  # rollout: as sampled; recomputed: by the trainer before the first step
    activation_checkpointing: float = 0.0  # share of the language model's layers that the backward pass runs again
    keep_checkpoints: int = 2
    timeout_s: float = 600.0  # seconds that ranks wait for each other, in every operation, before training fails


@dataclass
class EvaluateConfig:
    """Held-out evaluation of base and tuned weights under the same seeds."""

    prompts: str = ""  # folder of prompt shards; empty: no evaluation
    samples_per_prompt: int = 4
    batch_size: int = 32  # prompts sampled together
    guidance_scale: float = 1.0
    flow_steps: int = 0  # steps of the ODE; 0: as many as the rollout
    every: int = 0  # evaluate after every n-th iteration; 0: base and last only
    bootstrap: int = 2000  # resamples over prompts for the 95 % intervals
    questions: int = 0  # shapes only: questions per family asked to measure understanding


@dataclass
class RunConfig:
    """Everything that determines a run."""

    seed: int = 1234
    iterations: int = 1
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    self_consistency: SelfConsistencyConfig = field(default_factory=SelfConsistencyConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def keys_of(schema: type, prefix: str = "") -> list[str]:
    """All dotted leaf keys of a configuration dataclass."""
    keys = []
    for f in fields(schema):
        nested = f.default_factory if is_dataclass(f.default_factory) else None
        keys += keys_of(nested, f"{prefix}{f.name}.") if nested else [prefix + f.name]
    return keys


def nearest_key(key: str) -> str:
    """The valid key that looks most like `key`, by whole path or by last part."""
    valid = keys_of(RunConfig)
    typing_error = difflib.get_close_matches(key, valid, n=1, cutoff=0.85)
    same_leaf = [k for k in valid if k.split(".")[-1] == key.split(".")[-1]]
    return (typing_error or same_leaf or difflib.get_close_matches(key, valid, n=1, cutoff=0.3) or valid)[0]


def recipe_path(recipe: str) -> Path:
    """Path of a recipe given by name (`gvu_janus_shapes`) or by file name."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"recipe file {recipe} does not exist")
        return path
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        near = difflib.get_close_matches(recipe, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no recipe named {recipe}{hint} Recipes: {', '.join(names)}")
    return path


def recipe_layers(recipe: str) -> list[tuple[Path, DictConfig]]:
    """The recipe's files in the order of merging, those that it extends first."""
    path = recipe_path(recipe)
    content = OmegaConf.load(path)
    layers = []
    for parent in content.pop("extends", []):
        layers += recipe_layers(parent)
    return [*layers, (path, content)]


def _merge(base: DictConfig, update: DictConfig, source: str) -> DictConfig:
    try:
        return OmegaConf.merge(base, update)
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = error.full_key or str(error.key)
        raise ConfigError(f"{source}: unknown key {key}; the nearest valid key is {nearest_key(key)}") from None
    except ValidationError as error:
        raise ConfigError(f"{source}: wrong type for {error.full_key}: {str(error).splitlines()[0]}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from None


def resolve(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Recipe plus `key=value` overrides as a validated `RunConfig`.

    Raises:
        ConfigError: unknown recipe or key, wrong type, missing value, impossible combination.
    """
    config = OmegaConf.structured(RunConfig)
    for path, content in recipe_layers(recipe):
        config = _merge(config, content, str(path))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        if OmegaConf.is_dict(OmegaConf.select(config, key)):
            raise ConfigError(f"{key} is a section, not a value; set one of its keys, like {key}.NAME=value")
        config = _merge(config, OmegaConf.from_dotlist([override if value else f"{key}=''"]), f"override {override!r}")
    return validate(config)


def validate(config: DictConfig) -> RunConfig:
    """Check values and combinations; return the plain dataclass."""
    check_config(config)
    return OmegaConf.to_object(config)


def loop_of(config: RunConfig, iteration: int) -> str:
    """`understanding` or `generation`: which roles an iteration trains; empty for methods without roles."""
    ours = config.self_consistency
    if config.reward.method != "self_consistency":
        return ""
    place = iteration % (ours.understanding + ours.generation)
    return "understanding" if place < ours.understanding else "generation"


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text, keys in the order of the dataclasses."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def config_hash(config: RunConfig) -> str:
    """First 16 hex digits of the SHA-256 of the resolved YAML."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16]


def load_run_config(run: Path) -> RunConfig:
    """The configuration frozen in a run folder."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: start the run with `make loop RECIPE=... RUN={run}`")
    return validate(_merge(OmegaConf.structured(RunConfig), OmegaConf.load(path), str(path)))


def open_run(run: Path, recipe: str | None = None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Create `RUN/config.yaml`, or load it and check that the arguments agree with it.

    Raises:
        ConfigError: the run exists with another configuration (the message is a diff), or it does not exist
            and no recipe is given.
    """
    path = Path(run) / "config.yaml"
    if not path.exists():
        if recipe is None:
            raise ConfigError(f"{path} does not exist and no recipe is given; pass --recipe NAME")
        config = resolve(recipe, overrides)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, to_yaml(config).encode())
        return config
    stored = load_run_config(run)
    if recipe is None and not overrides:
        return stored
    if recipe is None:
        raise ConfigError(f"{run} exists already: overrides {' '.join(overrides)} need --recipe to be compared with it")
    wanted = resolve(recipe, overrides)
    if to_yaml(wanted) != to_yaml(stored):
        diff = difflib.unified_diff(
            to_yaml(stored).splitlines(), to_yaml(wanted).splitlines(), str(path), "this command", n=0, lineterm=""
        )
        raise ConfigError(
            f"{run} was started with another configuration; use a new RUN folder or the stored one:\n" + "\n".join(diff)
        )
    return stored


def checkpoint_path(path: str) -> Path:
    """Folder of a checkpoint; `assets:NAME` names one that ships with the package."""
    resolved = ASSETS / path.removeprefix("assets:") if path.startswith("assets:") else Path(path)
    if not (resolved / "config.json").is_file():
        raise ConfigError(f"{resolved} is not a checkpoint in Hugging Face layout: config.json is missing")
    return resolved
