"""Who may import whom, and what must stay quick to start."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sdcli"

LAYERS = [
    ("errors", "files", "toml"),
    ("registry", "extensions", "devices", "hub", "zoo"),
    ("recipe",),
    ("data",),
    ("network",),
    ("method",),
    ("evaluation", "export"),
    ("run",),
    ("compare",),
    ("report",),
    ("cli",),
]
"""Packages and single modules, lowest first: one imports only from layers below its own, and from itself."""


def imports_of(file: Path) -> set[str]:
    """Our own modules that a file imports, wherever in it, by their dotted paths without `sdcli.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sdcli."):
            module = node.module.removeprefix("sdcli.")
            names = [alias.name for alias in node.names if path_of(f"{module}.{alias.name}").exists()]
            found |= {f"{module}.{name}" for name in names} or {module}
        elif isinstance(node, ast.ImportFrom) and node.module == "sdcli":
            found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("sdcli.") for alias in node.names if alias.name.startswith("sdcli.")}
    return found


def path_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def module_of(file: Path) -> str:
    """The package of a file, or the module itself where it is in none."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_a_package_imports_only_from_layers_below_its_own():
    layer_of = {name: number for number, names in enumerate(LAYERS) for name in names}
    files = [file for file in PACKAGE.rglob("*.py") if module_of(file) not in ("__init__", "__main__")]
    assert {module_of(file) for file in files} == set(layer_of), (
        "every package has its layer here and in docs/architecture.md"
    )
    for file in files:
        for module in imports_of(file):
            name = module.partition(".")[0]
            inside = name == module_of(file)
            assert inside or layer_of[name] < layer_of[module_of(file)], f"{file.name} imports {module}"


def test_no_modules_import_each_other_in_a_circle():
    files = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    graph = {module: imports_of(file) & files.keys() for module, file in files.items()}
    # The package of the losses registers what lies in it.
    graph["method.losses.__init__"] = set()
    TopologicalSorter(graph).prepare()
    assert sum(map(len, graph.values())) > 100


def test_only_the_command_line_prints():
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        # The runner is a program of its own, copied beside exported networks.
        if module_of(file) != "cli" and file.name != "runner.py":
            called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            assert "print" not in called, file
            imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not imported & {"typer", "rich"}, file


def loaded_by(*arguments: str) -> set[str]:
    code = (
        f"import sys; sys.argv = ['sdcli', *{list(arguments)!r}]\n"
        "from sdcli.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(out.rsplit("LOADED", 1)[1].split())


def test_help_and_recipes_load_neither_torch_nor_timm():
    heavy = {"torch", "timm", "datasets", "accelerate", "torchvision", "numpy", "optuna"}
    commands = ["train", "eval", "inspect", "calibrate", "predict", "bench", "export", "tune", "report"]
    for arguments in (["--help"], *([command, "--help"] for command in commands)):
        assert not loaded_by(*arguments) & heavy, arguments
    for arguments in (["list"], ["copy", "--help"], ["losses", "--help"]):
        assert not loaded_by("recipes", *arguments) & heavy, arguments


def test_inspect_loads_neither_datasets_nor_accelerate():
    assert not loaded_by("inspect", "test_resnet") & {"datasets", "accelerate", "torchmetrics"}
