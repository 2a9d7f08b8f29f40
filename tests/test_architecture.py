"""The house as a whole: which way imports point, and where each heavy library lives."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("cxr_models/*.py"), *ROOT.glob("sweep/*.py")])

KERAS_HOMES = {"backbones", "layer_table", "freezing", "network", "training", "steps", "pretraining", "evaluation"} | {
    "unet",
    "epochs",
    "segmentation",
}
HOMES = {
    "tensorflow": {"steps"},
    "keras": KERAS_HOMES,
    "ray": {"trials", "ray_cluster", "ray_depot", "ray_metrics", "ray_worker"},
    "mlflow": {"mlflow_runs"},
    "optuna": {"search", "study_journal"},
    "matplotlib": {"plots", "report"},
    "yaml": {"document", "sender"},
    "fsspec": {"remote"},
}


def imported(path: Path, *, typing_too: bool = False) -> set[str]:
    """Every module a file imports, inside functions too; imports for type checkers alone do not run."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped.update(ast.walk(node))
    names = set()
    for node in ast.walk(tree):
        if node in skipped and not typing_too:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_heavy_imports_stay_home(path):
    packages = {name.partition(".")[0] for name in imported(path)}
    strays = {package for package, homes in HOMES.items() if package in packages and path.stem not in homes}
    assert not strays, f"{path.name} imports {strays}; their homes are {HOMES}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("cxr_models/*.py")), ids=lambda path: path.name)
def test_the_models_know_nothing_of_the_sweep(path):
    packages = {name.partition(".")[0] for name in imported(path, typing_too=True)}
    assert not packages & {"sweep", "ray", "mlflow", "yaml", "optuna"}


def test_no_import_cycle():
    modules = {f"{path.parent.name}.{path.stem}": path for path in SOURCES if path.stem != "__init__"}
    edges = {name: imported(path, typing_too=True) & modules.keys() for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"cycle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in edges[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("modules", ["sweep.spec, sweep.plan", "sweep.run", "sweep.runner, sweep.worker"])
def test_planning_loads_nothing_heavy(modules):
    heavy = {"tensorflow", "keras", "ray", "mlflow", "sklearn", "pandas", "matplotlib", "scipy"}
    code = f"import sys, {modules}; print(*sorted({heavy!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == []
