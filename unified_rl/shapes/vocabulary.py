"""The words of the tiny models: every sentence form of the world, and the tokenizer that is trained on them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from unified_rl.shapes.prompts import all_metadata
from unified_rl.shapes.proposing import drawing_task, proposal
from unified_rl.shapes.questions import COUNT_WORDS, LOOKUPS, TABLES, TAUGHT_FRAMINGS, make_questions, make_table
from unified_rl.shapes.ratings import rate_layout, rate_regions
from unified_rl.shapes.world import COLORS, IMAGE_SIZE, SHAPES

DESCRIBE = "Describe the image in detail."
VOCABULARY = 800  # enough merges to make every word, number and label of the world one token
# Words with the line break and colon of a label, numbers with their sign and the brackets of a box, all else alone.
PIECES = r"\n?[ ]?\p{L}+:?|[ ]?\(?-?[0-9]+(?:\.[0-9]+)?[,)]?|[ ]?[^\s\p{L}0-9]+|\s"


def corpus(drawing: str = "{}", asking: str = "{}", answering: str = "{}") -> list[str]:
    """Every sentence form of the world, in a chat format's forms of a drawing prompt, a question and an answer."""
    rng = random.Random("corpus")
    prompts = [m["prompt"] for items in all_metadata().values() for m in items[:120]]
    asked = make_questions(0, 120) + [make_table(rng, kinds) for kinds in (LOOKUPS, TABLES) for _ in range(100)]
    asked += [made(rng) for made in (proposal, drawing_task) for _ in range(150)]
    ratings = [made(rng) for made in (rate_regions, rate_layout) for _ in range(200)]
    pairs = [(made.question, made.answer) for made in [*asked, *ratings]] + [(DESCRIBE, prompt) for prompt in prompts]
    pairs += [(TAUGHT_FRAMINGS[i % 7] + q.question, q.answer) for i, q in enumerate(asked[:720])]
    words = [*COUNT_WORDS, "yes", "no", *SHAPES, *COLORS] * 20
    # Numbers that no rating of a grid's cells holds, so that other boxes and scores are short too.
    words += [f"1 ({n}, {n}, {n}, {n}) 2" for n in range(IMAGE_SIZE + 1)] * 10
    words += [f"Score: {sign}{n / 10}" for sign in ("", "-") for n in range(11)] * 10
    lines = [drawing.format(prompt) for prompt in prompts]
    lines += [text for question, answer in pairs for text in (asking.format(question), answering.format(answer))]
    return lines + [answering.format(word) for word in words]


def train_bpe(lines: Sequence[str], specials: Sequence[str]) -> Tokenizer:
    """Byte-level BPE on `lines` with the given special tokens; nothing is prepended."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(specials),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(lines, trainer)
    return bpe
