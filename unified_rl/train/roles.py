"""Which weights an iteration trains, on what, and how the policies of all roles come to lie in one folder.

GvU and SRUM train one nameless role, "", whose policy is the folder itself. Ask-Solve-Generate has an adapter for each
role, in a sub-folder of the policy; a role that was never trained has none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unified_rl.backbones.policy_files import ADAPTER_WEIGHTS, ROLES
from unified_rl.config import RunConfig, loop_of
from unified_rl.files import sha256_file
from unified_rl.ledger import Run
from unified_rl.train.samples import IterationData, load_iteration
from unified_rl.train.texts import TEXT_ROLES, TextData, load_texts


def roles_of(config: RunConfig, iteration: int) -> tuple[str, ...]:
    """The roles that an iteration trains, in this order."""
    if config.reward.method != "self_consistency":
        return ("",)
    if loop_of(config, iteration) == "generation":
        return ("generator",)
    return TEXT_ROLES if config.self_consistency.train_proposer else ("solver",)


def last_trained(config: RunConfig, iteration: int, role: str) -> int:
    """The iteration before this one that trained the role; -1 for none."""
    return next((k for k in range(iteration - 1, -1, -1) if role in roles_of(config, k)), -1)


def load_data(run: Run, iteration: int, role: str) -> IterationData | TextData:
    """What the role trains on; for errors see `load_iteration` and `load_texts`."""
    return load_texts(run, iteration, role) if role in TEXT_ROLES else load_iteration(run, iteration)


def samples_per_step(config: RunConfig, role: str) -> tuple[int, int]:
    """(groups, samples of a group) of one optimiser step over all ranks."""
    roles = config.self_consistency
    if role == "solver":
        return roles.solver_groups_per_step, roles.answers
    return config.train.groups_per_step, roles.questions if role == "proposer" else config.rollout.group_size


def named(role: str, values: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """Entries of a report; those of roles that share an iteration begin with the role."""
    prefix = f"{role}{separator}" if role in TEXT_ROLES else ""
    return {f"{prefix}{name}": value for name, value in values.items()}


def carry_over(run: Run, iteration: int) -> None:
    """Put the policies of the roles that this iteration did not train beside those that it did, as hard links."""
    before, _ = run.current_policy(iteration)
    for role in sorted(set(ROLES) - set(roles_of(run.config, iteration))):
        target = run.policy_folder(iteration) / role
        shutil.rmtree(target, ignore_errors=True)  # half of it, left by a killed process
        if before is not None and (before / role).is_dir():
            shutil.copytree(before / role, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def policy_digest(folder: Path) -> str:
    """SHA-256 that names the weights of all roles of a policy folder."""
    files = [folder / role / ADAPTER_WEIGHTS for role in ROLES]
    lines = [f"{file.parent.name} {sha256_file(file)}\n" for file in files if file.exists()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
