"""What the Proposer of Ask-Solve-Generate writes about a picture of the world: questions, and drawing tasks.

Both in their brief wording. A proposed question is one of the families of `questions` that fits the picture; a drawing
task is the picture's prompt with questions whose answers the prompt states.
"""

from __future__ import annotations

import random

from unified_rl.reward.self_consistency_prompts import DIFFICULTIES, drawing_task_question, proposer_question
from unified_rl.shapes.prompts import plural, random_metadata, scene_for
from unified_rl.shapes.questions import COUNT_WORDS, EASY, HARD, Question, make_question
from unified_rl.shapes.world import SHAPES

FAMILIES_OF = dict(zip(DIFFICULTIES, (EASY, HARD), strict=True)) | {None: EASY + HARD}
PAIRS = 3  # questions of a drawing task
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def proposal(rng: random.Random) -> Question:
    """The Proposer's task for one question, of random difficulty, with a fitting question as the answer."""
    difficulty = rng.choice(list(FAMILIES_OF))
    asked = make_question(rng.choice(FAMILIES_OF[difficulty]), rng)
    return Question("proposal", asked.scene, proposer_question(difficulty, "brief"), f"Question: {asked.question}")


def stated_facts(metadata: dict) -> list[tuple[str, str]]:
    """Questions of the world's families, with answers, about what a prompt states of each of its clauses."""
    facts = []
    for clause in metadata["include"]:
        shape, color = clause["class"], clause.get("color")
        facts.append((f"how many {plural(shape)} are there?", COUNT_WORDS[clause["count"]]))
        if color:
            facts += [(f"what color is the {shape}?", color), (f"what shape is the {color} object?", shape)]
        else:
            facts.append((f"is there a {shape}?", "yes"))
        if "position" in clause:
            relation, other = clause["position"][0], metadata["include"][clause["position"][1]]["class"]
            facts.append((f"is the {shape} {relation} the {other}?", "yes"))
            facts.append((f"is the {shape} {OPPOSITE[relation]} the {other}?", "no"))
    return facts


def drawing_task(rng: random.Random) -> Question:
    """The Proposer's task for a prompt to draw from, with the prompt and `PAIRS` questions as the answer."""
    metadata = random_metadata(rng)
    present = {clause["class"] for clause in metadata["include"]}
    stated = stated_facts(metadata)
    absent = [(f"is there a {shape}?", "no") for shape in SHAPES if shape not in present]
    chosen = rng.sample(stated, min(len(stated), rng.randint(2, PAIRS)))
    chosen += rng.sample(absent, PAIRS - len(chosen))
    pairs = "".join(f"\nQuestion: {question}\nAnswer: {answer}" for question, answer in chosen)
    asked = drawing_task_question(PAIRS, wording="brief")
    return Question("drawing task", scene_for(metadata, rng), asked, f"Prompt: {metadata['prompt']}{pairs}")
