"""Who may import whom, and what a login node must not need."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "teams_hpc"
LEVELS = (
    {"errors"},
    {"config"},
    {"runtime", "storage"},
    {"cluster", "llm"},
    {"rewriting"},
    {"policy", "generation", "dataset", "sft", "evaluation"},
    {"pipeline", "report"},
    {"cli"},
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
# `report` reads the stage graph; of the two, only in this direction.
SIDEWAYS = {("report", "pipeline")}
HEAVY = ("torch", "transformers", "deepspeed", "mpi4py", "h5py", "stable_baselines3", "matplotlib")


def top_level_part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "teams_hpc":
                names = [f"teams_hpc.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("teams_hpc."))


SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE] + [
    PACKAGE / "errors.py",
    PACKAGE / "cli.py",
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path: Path) -> None:
    part = top_level_part(path)
    if part == "data":
        return
    for other in set(imported_parts(path)) - {part, "__version__"}:
        allowed = LEVEL[other] < LEVEL[part] or (part, other) in SIDEWAYS
        assert allowed, f"{path} imports {other}, which does not stand to its left"


@pytest.mark.parametrize(
    "statement",
    [
        "import teams_hpc.cli",
        "import teams_hpc.config",
        "import teams_hpc.pipeline.local",
        "import teams_hpc.report.status",
        "import teams_hpc.report.verification",
    ],
)
def test_a_login_node_needs_no_heavy_package(statement: str) -> None:
    check = f"{statement}; import sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run(
        (sys.executable, "-c", check), capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("stage", ["policy", "dataset", "sft"])
def test_only_generation_may_load_mpi(stage: str) -> None:
    """A process that loads it under a launcher joins its world, and dies with it."""
    check = (
        "import sys; from teams_hpc.config import Config; "
        "from teams_hpc.pipeline.graph import find_stage; "
        f"find_stage(Config(name='t'), {stage!r}).load(); print('mpi4py' in sys.modules)"
    )
    found = subprocess.run(
        (sys.executable, "-c", check), capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout.splitlines()[-1] == "False"
