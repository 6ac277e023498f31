"""Shape of the code: sizes, one-way imports, and the two files that know DeepSpeed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "unified_rl"
FILES = sorted(
    p for folder in ("unified_rl", "tests", "data_tools", "benchmarks") for p in (ROOT / folder).rglob("*.py")
)
MODULES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_PACKAGE_LINES = 21_000

FOUNDATION = {
    "__init__", "config", "config_checks", "files", "inquiries", "ledger", "manifests", "record_parts", "records",
    "runtime", "shards", "status",
}  # fmt: skip
# Loading partitioned weights is below the train stage, which knows everything else about DeepSpeed.
DEEPSPEED = (PACKAGE / "train" / "zero3.py", PACKAGE / "backbones" / "partitioned.py")
# What a part may import besides itself; the stage parts and the launchers' helper stand above everything.
ALLOWED = {
    "policy": set(),
    "backbones": FOUNDATION,
    "shapes": FOUNDATION | {"backbones", "reward"},  # the tiny models are taught the judge's own questions
    **dict.fromkeys(FOUNDATION, FOUNDATION),
}


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> list[str]:
    """Dotted names that a file imports anywhere; imports for type checking only do not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def part(dotted: str) -> str:
    """`config` for unified_rl.config, `backbones` for unified_rl.backbones.janus."""
    pieces = dotted.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_size_of_the_package() -> None:
    assert sum(path.read_text().count("\n") for path in MODULES) <= MAX_PACKAGE_LINES


@pytest.mark.parametrize("path", MODULES, ids=identifier)
def test_two_files_know_deepspeed(path: Path) -> None:
    knows = any(name.split(".")[0] == "deepspeed" for name in imports(path))
    assert knows == (path in DEEPSPEED)


@pytest.mark.parametrize("path", DEEPSPEED, ids=identifier)
def test_deepspeed_is_imported_only_when_it_is_used(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "deepspeed" not in ast.unparse(node)


@pytest.mark.parametrize("path", MODULES, ids=identifier)
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own not in ALLOWED:
        return
    used = {part(name) for name in imports(path) if name.split(".")[0] == "unified_rl"}
    assert used <= ALLOWED[own] | {own, "__init__"}, "a lower part imports a higher one"


@pytest.mark.parametrize("path", sorted((PACKAGE / "policy").glob("*.py")), ids=identifier)
def test_policy_maths_knows_no_processes(path: Path) -> None:
    assert not any(name.startswith("torch.distributed") for name in imports(path))


@pytest.mark.parametrize("path", MODULES, ids=identifier)
def test_public_functions_are_typed(path: Path) -> None:
    tree = ast.parse(path.read_text())
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for node in (node for scope in scopes for node in scope.body):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{node.name}: {bare} without a type"
            assert node.returns is not None, f"{node.name} without a return type"
