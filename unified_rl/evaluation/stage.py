"""The evaluation stage: images of held-out prompts with the weights after K iterations, and their scores.

The seeds do not depend on K: base and tuned weights draw the same prompts with the same noise. Images go through the
same disk contract as rollouts. Work is split into units (shards of images, sets of questions) over the workers; the
worker that finishes last writes scores.json and commits.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unified_rl.config import RunConfig, config_hash, open_run
from unified_rl.evaluation.compare import compare, table
from unified_rl.evaluation.folder import (
    SCORES,
    Marks,
    evaluated_iterations,
    evaluation_folder,
    prompts_sha256,
    read_scores,
    shard_stem,
)
from unified_rl.evaluation.geneval import is_shapes_prompt, write_geneval_samples
from unified_rl.evaluation.scoring import (
    EvaluationError,
    check_complete,
    drawing_scores,
    understanding_scores,
)
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest, encode_json, read_manifest, store, write_manifest
from unified_rl.records import PromptRecord, RolloutRecord
from unified_rl.report.timing import append_timing
from unified_rl.runtime import (
    EXIT_OK,
    EXIT_STOPPED,
    Progress,
    Ranks,
    StopRequest,
    current_ranks,
    log,
    sample_seed,
    set_cpu_threads,
    stage_arguments,
)
from unified_rl.shards import load_prompts, write_records

if TYPE_CHECKING:
    from unified_rl.backbones.load import Backbone

STAGE = "evaluation"
SEED_ITERATION = -1  # no training iteration has it, and all evaluations share it


def main(argv: list[str] | None = None) -> int:
    """Command line of the stage; `--iteration K` names the weights after K iterations, 0 the base."""
    arguments = stage_arguments(STAGE, "python -m unified_rl.evaluation --run runs/demo --iteration 0", argv)
    config = open_run(arguments.run, arguments.recipe, arguments.overrides)
    run, ranks = Run(arguments.run, config), current_ranks()
    with run.lock(f"{STAGE}-{ranks.rank}"):
        return evaluate(run, arguments.iteration, ranks)


@dataclass(frozen=True)
class Plan:
    """One evaluation: its folder, prompts by shard, sets of questions, and the weights."""

    config: RunConfig
    folder: Path
    marks: Marks
    shards: list[list[PromptRecord]]
    question_sets: tuple[str, ...]
    policy: Path | None
    version: str
    detector: bool

    @property
    def units(self) -> int:
        """Number of units of work: shards first, then sets of questions."""
        return len(self.shards) + len(self.question_sets)

    def is_done(self, unit: int) -> bool:
        """Whether a unit has a valid mark."""
        if unit < len(self.shards):
            return self.marks.read_shard(unit) is not None
        return self.marks.read(f"answers-{self.question_sets[unit - len(self.shards)]}") is not None


def make_plan(run: Run, iteration: int) -> Plan:
    """What has to be evaluated.

    Raises:
        EvaluationError: some prompts belong to the world of shapes and others do not.
    """
    config = run.config
    prompts = load_prompts(Path(config.evaluate.prompts))
    judged = [is_shapes_prompt(p) for p in prompts]
    if any(judged) != all(judged):
        odd = prompts[judged.index(not judged[0])].prompt_id
        raise EvaluationError(
            f"{config.evaluate.prompts}: prompt {odd} and prompt {prompts[0].prompt_id} need different detectors; "
            "evaluate them in separate runs"
        )
    policy, version = run.current_policy(iteration)
    folder = evaluation_folder(run.path, iteration)
    folder.mkdir(parents=True, exist_ok=True)
    context = {
        "policy_version": version,
        "config_hash": config_hash(config),
        "prompts_sha256": prompts_sha256(Path(config.evaluate.prompts)),
    }
    size = config.rollout.groups_per_shard
    shards = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    asked: tuple[str, ...] = ()
    if config.evaluate.questions > 0:
        from unified_rl.evaluation.understanding import question_sets

        asked = question_sets(config)
    return Plan(config, folder, Marks(folder, context), shards, asked, policy, version, judged[0])


def evaluate(run: Run, iteration: int, ranks: Ranks) -> int:
    """Do this worker's units of an evaluation; commits when all workers' units are there.

    Returns:
        EXIT_OK, or EXIT_STOPPED after a request to stop (finished units are kept).
    """
    if not run.config.evaluate.prompts:
        log("evaluate.prompts is empty: nothing to evaluate")
        return EXIT_OK
    started = time.monotonic()
    plan = make_plan(run, iteration)
    committed = read_manifest(plan.folder)
    if committed is not None:
        if committed.policy_version != plan.version:
            raise EvaluationError(
                f"{plan.folder} evaluates weights {committed.policy_version}, the run now has {plan.version}; "
                "delete the folder and evaluate again"
            )
        log(f"evaluation of iteration {iteration} is already committed")
        if ranks.rank == 0:
            print_comparison(run, iteration)
        return EXIT_OK
    mine = [u for u in range(ranks.rank, plan.units, ranks.world_size) if not plan.is_done(u)]
    if mine and do_units(run, iteration, plan, mine, ranks) == EXIT_STOPPED:
        return EXIT_STOPPED
    scores = commit_if_complete(plan, iteration)
    if scores is not None:
        append_timing(run.path, STAGE, iteration, time.monotonic() - started)
        shown = ("overall", "best_of_g", "reward_mean", "caption_ranking", "question_answering")
        log(f"iteration {iteration}: " + ", ".join(f"{n} {scores[n]:.4f}" for n in shown if n in scores))
        print_comparison(run, iteration)
    return EXIT_OK


def print_comparison(run: Run, iteration: int) -> None:
    """The table of base against tuned weights, as soon as both are evaluated."""
    trained = [k for k in evaluated_iterations(run.path) if k > 0]
    if trained and read_scores(run.path, 0) is not None:
        print(table(compare(run.path, iteration or trained[-1])), flush=True)


def do_units(run: Run, iteration: int, plan: Plan, mine: list[int], ranks: Ranks) -> int:
    """Load the weights and do the units `mine`."""
    # Imported here so that a committed evaluation is passed over without loading torch.
    from unified_rl.backbones.load import load_backbone

    config = plan.config
    set_cpu_threads(config.backbone.threads)
    roles = config.reward.method == "self_consistency"
    policy = load_backbone(config.backbone, ranks.local_rank, plan.policy, roles=roles)
    judge = policy if plan.policy is None else load_backbone(config.backbone, ranks.local_rank)
    with StopRequest() as stop, Progress(len(mine), "units") as bar:
        for unit in mine:
            if stop.requested:
                log("stopped on request; run the same command again to go on")
                return EXIT_STOPPED
            draws = unit < len(plan.shards)
            with policy.role("generator" if draws else "solver") if roles else nullcontext():
                if draws:
                    draw_shard(plan, unit, policy, judge)
                else:
                    from unified_rl.evaluation.understanding import answer

                    name = plan.question_sets[unit - len(plan.shards)]
                    plan.marks.write(f"answers-{name}", {"outcomes": answer(policy, name, config)})
            bar.update()
            run.write_status(stage=STAGE, iteration=iteration, done=bar.done, total=len(mine), eta_s=bar.eta_s)
    return EXIT_OK


def draw_shard(plan: Plan, index: int, policy: Backbone, judge: Backbone) -> None:
    """Draw, score and store one shard of images."""
    from unified_rl.rollout.groups import draw_groups, evaluation_sampling

    config = plan.config
    samples = config.evaluate.samples_per_prompt

    def seeds_of(prompt: PromptRecord) -> list[int]:
        return [sample_seed(config.seed, SEED_ITERATION, prompt.prompt_id, j) for j in range(samples)]

    prompts = plan.shards[index]
    sampling = evaluation_sampling(policy.sampling_type, config)
    batches = draw_groups(policy, prompts, seeds_of, sampling, config.evaluate.batch_size, plan.version, config.rollout)
    records = [record for batch in batches for record in batch]
    rewards = judge_rewards(judge, records, config)
    outcomes = {p.prompt_id: outcome_of(plan, p, records, rewards) for p in prompts}
    info = write_records(plan.folder / f"{shard_stem(index)}.tar", records)
    if not plan.detector:
        write_geneval_samples(plan.folder / "geneval", sum(map(len, plan.shards[:index])), records)
    plan.marks.write_shard(index, info, outcomes)


def judge_rewards(judge: Backbone, records: list[RolloutRecord], config: RunConfig) -> dict[str, float]:
    """Key -> reward of the frozen judge.

    Raises:
        EvaluationError: a score is not a finite number; the message names the image.
    """
    import math

    from unified_rl.reward.gvu import gvu_scores

    rewards: dict[str, float] = {}
    for start in range(0, len(records), config.reward.batch_size):
        part = records[start : start + config.reward.batch_size]
        scores = gvu_scores(judge, [r.image for r in part], [r.prompt.text for r in part], config.reward.question)
        for record, score in zip(part, scores, strict=True):
            if not score.tokens or not math.isfinite(score.mean_log_prob):
                raise EvaluationError(f"image {record.key} has no finite likelihood under the judge")
            log_domain = config.reward.domain == "log"
            rewards[record.key] = score.mean_log_prob if log_domain else score.geometric_mean
    return rewards


def outcome_of(plan: Plan, prompt: PromptRecord, records: list[RolloutRecord], rewards: dict[str, float]) -> dict:
    """Outcomes of one prompt's images, in the order of their sample numbers."""
    images = sorted((r for r in records if r.prompt.prompt_id == prompt.prompt_id), key=lambda r: r.sample)
    outcome: dict = {"text": prompt.text, "rewards": [rewards[r.key] for r in images]}
    if plan.detector:
        from unified_rl.shapes.world import is_correct

        outcome["category"] = prompt.metadata["tag"]
        outcome["correct"] = [bool(is_correct(r.image, prompt.metadata)) for r in images]
    return outcome


def commit_if_complete(plan: Plan, iteration: int) -> dict | None:
    """Write scores.json and the manifest when every unit is done; returns the scores.

    The content depends on the marks alone, so that two workers that come here together write the same bytes.
    """
    shard_marks = [plan.marks.read_shard(i) for i in range(len(plan.shards))]
    answer_marks = {name: plan.marks.read(f"answers-{name}") for name in plan.question_sets}
    if any(m is None for m in shard_marks) or any(m is None for m in answer_marks.values()):
        return None
    config = plan.config
    samples = config.evaluate.samples_per_prompt
    prompts = {prompt_id: outcome for _, outcomes in shard_marks for prompt_id, outcome in outcomes.items()}
    expected = [p.prompt_id for shard in plan.shards for p in shard]
    check_complete(prompts, expected, samples)
    answers = {name: mark["outcomes"] for name, mark in answer_marks.items()}
    scores = {
        **drawing_scores(prompts),
        **understanding_scores(answers),
        "iteration": iteration,
        "policy_version": plan.version,
        "prompts_sha256": plan.marks.context["prompts_sha256"],
        "sampling": {
            "seed": config.seed, "temperature": config.rollout.temperature, "samples_per_prompt": samples,
            "guidance_scale": config.evaluate.guidance_scale,
            "flow_steps": config.evaluate.flow_steps or config.rollout.flow.steps,
        },
        "prompts": {prompt_id: prompts[prompt_id] for prompt_id in expected},
        "answers": answers,
    }  # fmt: skip
    store(plan.folder / SCORES, encode_json(scores))
    counts = {"groups": len(expected), "images": len(expected) * samples}
    infos = [info for info, _ in shard_marks]
    write_manifest(
        plan.folder,
        Manifest(STAGE, iteration, infos, plan.version, plan.marks.context["config_hash"], counts),
    )
    return scores
