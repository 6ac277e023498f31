"""One rank of a BAGEL under ZeRO-3: `python bagel_ranks.py OUT FOLDER`; compares it with the whole model.

The ranks draw and train unlike prompts, some of them twice. Writes the differences to OUT.RANK.json.
"""

import json
import sys
from pathlib import Path

import torch

from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.bagel.flow import FlowSampling
from unified_rl.runtime import current_ranks
from unified_rl.train import zero3
from unified_rl.train.drawing import DrawingPath, select_trainable, whole_tensors
from unified_rl.train.zero3 import Zero3Engine, load_ds_config

# Guidance acts at times from 1 to 0.7: on rank 0 in some of the steps, on rank 1 in none.
SAMPLING = FlowSampling(steps=6, shift=1.0, eta=0.7, sde_window=2, guidance_above=0.7)
PROMPTS = (["a red circle", "a red circle", "two rings"], ["yes", "no", "What is it?"])
WEIGHTS = (0.7, 1.3)  # of the two losses


def losses(call, prompts, trajectory, seeds):
    """A sum over the samples of both losses that training has, and their parts."""
    log_probs, kl, _ = call("decisions", prompts, trajectory, SAMPLING, None, None, torch.zeros_like(trajectory.taken))
    cells = call("cell_losses", prompts, trajectory, seeds, 4.0, [False, True, False])
    total = WEIGHTS[0] * (log_probs.sum() + 0.01 * kl.sum()) + WEIGHTS[1] * cells.sum()
    return total, [log_probs.detach(), cells.detach()]


def load(folder, scope, ds_config=None):
    """A backbone whose trained parameters require gradients, and their names."""
    backbone = BagelBackbone.from_pretrained(folder, ds_config=ds_config)
    loaded = whole_tensors(backbone.model, [name for name, _ in backbone.model.named_parameters()])
    if scope == "lora":
        backbone.add_lora(4, 8)
    return backbone, select_trainable(backbone, scope, torch.float32), loaded


def compare(folder: str, scope: str, mine: int) -> dict[str, float]:
    """Differences in loading, outputs, gradients and the weights after a step."""
    whole, names, expected_weights = load(folder, scope)
    seeds = [[10 * rank + i for i in range(3)] for rank in range(2)]
    drawn = [whole.rollout_images(PROMPTS[r], [window_seed(r), *seeds[r][1:]], SAMPLING) for r in range(2)]

    ds_config = load_ds_config("zero3_cpu", "float32", 3, 1, 2, 0.0)
    parts, partitioned_names, weights = load(folder, scope, ds_config)
    assert partitioned_names == names
    assert sum(p.ds_tensor.numel() for p in parts.model.parameters() if hasattr(p, "ds_id")) < 0.6 * sum(
        weight.numel() for weight in weights.values()
    )
    differences = {"weights": largest((weights[name] - weight) for name, weight in expected_weights.items())}
    engine = Zero3Engine(DrawingPath(parts), ds_config)

    total, found = losses(engine, PROMPTS[mine], drawn[mine], seeds[mine])
    engine.backward(total, last=True)
    norm = engine.step(1e-3)

    parameters = dict(whole.model.named_parameters())
    optimizer = torch.optim.AdamW([parameters[name] for name in names], lr=1e-3, weight_decay=0.0)
    for rank in range(2):
        total, expected = losses(DrawingPath(whole), PROMPTS[rank], drawn[rank], seeds[rank])
        total.backward()
        if rank == mine:
            differences["outputs"] = largest(a - b for a, b in zip(found, expected, strict=True))
    gradients = {name: parameters[name].grad for name in names}
    differences["grad_norm"] = norm / float(torch.stack([g.norm() for g in gradients.values()]).norm()) - 1
    optimizer.step()
    after = whole_tensors(parts.model, names)
    # Adam's first step is the sign of the gradient, which rounding decides where it is tiny.
    differences["step"] = largest((after[n] - parameters[n]) * (gradients[n].abs() > 1e-4) for n in names)
    return differences


def largest(differences):
    """Largest absolute number in some tensors."""
    return max(float(difference.abs().max()) for difference in differences)


def window_seed(rank: int) -> int:
    """A seed whose window starts at step 0 on rank 0 and at step 3, past all guidance, on rank 1."""
    return next(seed for seed in range(1000) if SAMPLING.window_start(seed) == 3 * rank)


if __name__ == "__main__":
    zero3.init_process_group(current_ranks(), "cpu")
    results = {scope: compare(sys.argv[2], scope, current_ranks().rank) for scope in ("full", "lora")}
    zero3.leave_process_group()
    Path(f"{sys.argv[1]}.{current_ranks().rank}.json").write_text(json.dumps(results))
