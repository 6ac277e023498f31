"""README and its companions name only targets, recipes, modules and files that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAPERS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "ds_configs" / "README.md"]
PAPERS += sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_paper_names_exists(paper: Path) -> None:
    text = paper.read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^ {4}|`(?:\w+=\S+ )*)make ([a-z][a-z-]*)", text, re.MULTILINE)
    assert set(named) <= targets
    for recipe in re.findall(r"RECIPE=(\w+)", text):
        assert (ROOT / "unified_rl" / "recipes" / f"{recipe}.yaml").is_file(), recipe
    for module in re.findall(r"python -m (unified_rl[a-z0-9_.]*)", text):
        assert importlib.util.find_spec(module.rstrip(".")) is not None, module
    for script in re.findall(r"\b((?:data_tools|benchmarks|launch)/[a-z_]+\.(?:py|sh))", text):
        assert (ROOT / script).is_file(), script
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (paper.parent / link).exists(), link


def test_readme_says_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "    make demo " in text
    assert "    make test " in text
