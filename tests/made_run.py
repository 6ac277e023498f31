"""A finished run without a model: a painter of shapes of a given skill stands in for the backbone."""

import hashlib
import json
import random

import numpy as np
import torch

from unified_rl.backbones.base import Sampling, TextScore, TextTraj, TokenTraj
from unified_rl.config import open_run
from unified_rl.evaluation.stage import evaluate
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest, write_manifest
from unified_rl.records import PromptRecord
from unified_rl.reward.stage import reward
from unified_rl.rollout.stage import rollout
from unified_rl.runtime import EXIT_OK, Ranks
from unified_rl.shapes.prompts import all_metadata, prompt_records, scene_for
from unified_rl.shapes.questions import random_scene
from unified_rl.shapes.world import is_correct, render
from unified_rl.shards import write_records

BY_PROMPT = {m["prompt"]: m for items in all_metadata().values() for m in items}
TOKENS = 4


class Words:
    """Tokenizer: one id a word."""

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        return [self.ids.setdefault(word, len(self.ids)) for word in text.split()]

    def decode(self, ids):
        return " " + next(word for word, i in self.ids.items() if i == ids[0])


class Uniform:
    """Every decision has log-probability -1."""

    def reference(self, taken):
        return torch.full(taken.shape, -1.0)


class Painter:
    """Draws a prompt rightly with probability `skill`; reads pictures perfectly; answers every question with yes."""

    device = torch.device("cpu")
    sampling_type = Sampling

    def __init__(self, skill):
        self.skill = skill
        self.tokenizer = Words()
        self.drawn = {}

    def rollout_images(self, prompts, seeds, sampling, plans=None):
        each = len(seeds) // len(prompts)
        actions = torch.tensor([[s >> (15 * i) & 0x7FFF for i in range(TOKENS)] for s in seeds])
        for i, seed in enumerate(seeds):
            rng = random.Random(seed)
            right = rng.random() < self.skill
            metadata = BY_PROMPT[prompts[i // each]]
            scene = scene_for(metadata, rng) if right else random_scene(rng, 2)
            self.drawn[tuple(actions[i].tolist())] = render(scene)
        return TokenTraj(actions, torch.full(actions.shape, -1.0))

    def decode(self, trajectory):
        return np.stack([self.drawn[tuple(row)] for row in trajectory.actions.tolist()])

    def image_dist(self, prompts, trajectory, sampling, steps=None, plans=None):
        return Uniform()

    def text_logps(self, images, questions, responses, end_of_turn=False):
        ids = [self.tokenizer.encode(r) for r in responses]
        length = max(map(len, ids))
        log_probs, mask = torch.zeros(len(ids), length), torch.zeros(len(ids), length)
        for i, (image, text) in enumerate(zip(images, responses, strict=True)):
            right = is_correct(image, BY_PROMPT[text])
            for j, word in enumerate(text.split()):
                log_probs[i, j] = (
                    -0.1 if right or word in ("a", "photo", "of") else -2.0 - 0.3 * j - 0.001 * (image.sum() % 97)
                )
            mask[i, : len(ids[i])] = 1
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        return TextScore(log_probs, mask, padded)

    def rollout_text(self, images, questions, seeds, max_new_tokens, temperature):
        blank = torch.zeros(len(images), 1)
        return TextTraj(blank.long(), blank, blank, blank + 1, ["yes"] * len(images))


def pack(folder, records):
    folder.mkdir(parents=True)
    info = write_records(folder / "prompts-00000.tar", records)
    write_manifest(folder, Manifest("prompts", 0, [info], "base", "", {"prompts": len(records)}))
    return folder


def use_painter(monkeypatch):
    """Replace the backbone: base weights have skill 0.3, the policy after iteration k has 0.3 + 0.2 (k + 1)."""

    def load(config, local_rank=0, policy=None, ds_config=None, roles=False):
        return Painter(0.3 if policy is None else 0.5 + 0.2 * int(policy.parent.name[-1]))

    monkeypatch.setattr("unified_rl.reward.judges.load_backbone", load)
    monkeypatch.setattr("unified_rl.backbones.load.load_backbone", load)


def open_made_run(folder, *overrides, heldout: list[PromptRecord] | None = None):
    """A run folder with prompts: 24 for training, four a category held out."""
    if not (folder / "train").exists():
        pack(folder / "train", prompt_records("train")[::14])
        pack(folder / "heldout", heldout or prompt_records("heldout")[::8])
    config = open_run(
        folder / "run", "gvu_janus_shapes", [
            "iterations=2", f"data.prompts={folder / 'train'}", "data.prompts_per_iteration=8",
            "rollout.group_size=4", "rollout.groups_per_shard=4", f"evaluate.prompts={folder / 'heldout'}",
            "evaluate.samples_per_prompt=4", "evaluate.questions=10", "evaluate.bootstrap=200", *overrides,
        ],
    )  # fmt: skip
    return Run(folder / "run", config)


def pretend_training(run, iteration):
    """Commit a train stage with plausible metrics and weights that the painter does not read."""
    weights = f"weights {iteration}".encode()
    folder = run.policy_folder(iteration)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    rows = [
        {"step": 4 * iteration + i, "kl": 0.001 * (4 * iteration + i), "entropy": 2.0 - 0.05 * (4 * iteration + i),
         "clip/low_fraction": 0.01 * i, "clip/high_fraction": 0.02 * i, "grad_norm": 0.5 + 0.1 * i,
         "ratio/max_deviation": 0.02 * i, "policy/loss": -0.01 * i}
        for i in range(4)
    ]  # fmt: skip
    train = run.stage_folder(iteration, "train")
    (train / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = {"groups_used": 7, "groups_zero_std": 1, "groups_failed": 0, "steps": 4, "images": 28}
    extra = {"policy_sha256": hashlib.sha256(weights).hexdigest(), "checkpoint": "", "reward_mean": 0.5}
    version = run.current_policy(iteration)[1]
    run.commit(Manifest("train", iteration, [], version, run.config_hash, counts, extra=extra))


def finish(run):
    """All stages of all iterations, base and final evaluation."""
    one = Ranks(0, 0, 1)
    assert evaluate(run, 0, one) == EXIT_OK
    for iteration in range(run.config.iterations):
        assert rollout(run, iteration, one) == EXIT_OK
        assert reward(run, iteration, one) == EXIT_OK
        pretend_training(run, iteration)
    assert evaluate(run, run.config.iterations, one) == EXIT_OK
    return run
