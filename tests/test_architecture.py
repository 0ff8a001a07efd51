"""The rooms of the package import downward only, and help is answered without torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cluda_cli"
# Lower number = lower room. A module may import its own room and lower ones.
ROOMS = {
    "errors": 0, "files": 0, "seeds": 0, "spans": 0, "settings": 0, "console": 0, "presets": 1, "runs": 1,
    "distributed": 1, "data": 2, "preparation": 3, "demo": 3, "models": 3, "adaptation": 4, "objectives": 5,
    "inference": 6, "engine": 7, "measure": 8, "commands": 9, "cli": 10, "__main__": 11, "__init__": 12,
}  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_downward(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cluda_cli":
            parts = node.module.split(".")[1:]
            imported |= {parts[0]} if parts else {alias.name for alias in node.names}
    imported.discard("__version__")
    too_high = {name for name in imported if ROOMS[name] > ROOMS[room(path)]}
    assert not too_high


TORCH_FREE = [
    "cli",
    "distributed.place",
    "distributed.children",
    "settings",
    "presets",
    "console",
    "errors",
    "data.labels",
    "data.index",
]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_help_needs_no_torch(module):
    code = f"import sys, cluda_cli.{module}; assert not {{'torch', 'timm', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inference_needs_no_engine():
    verbs = "import cluda_cli.commands.evaluate, cluda_cli.commands.predict, cluda_cli.commands.pseudo_label, sys"
    check = "assert not [name for name in sys.modules if name.startswith('cluda_cli.engine')]"
    subprocess.run([sys.executable, "-c", f"{verbs}; {check}"], check=True)


ENGINE = [path for path in MODULES if room(path) == "engine"]


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.name)
def test_the_engine_does_not_know_how_many_resolutions_a_network_has(path):
    """It may have the network of the settings built; from then on views carry boxes and outputs carry detail."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            built = node.module == "cluda_cli.models.multires" and [a.name for a in node.names] == ["build_segmenter"]
            words |= set() if built else {node.module or "", *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            words.add(node.value)  # such as getattr(x, "...")
        else:
            words |= {getattr(node, field, None) for field in ("id", "attr", "name", "arg")}
    pattern = re.compile("multi_?res|hrda|scale_attention|detail_crop", re.IGNORECASE)
    assert not {word for word in words if isinstance(word, str) and pattern.search(word)}


def test_every_module_has_its_test_file():
    """tests/ mirrors the tree; packages and modules of a few lines are tested with what uses them."""
    inside = [path.relative_to(PACKAGE) for path in MODULES if path.read_text(encoding="utf-8").count("\n") > 40]
    mirrors = {path: Path(__file__).parent / path.with_name(f"test_{path.name}") for path in inside}
    assert not [str(path) for path, test in mirrors.items() if path.name != "__init__.py" and not test.is_file()]


def test_functions_stay_short():
    long = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 60
    ]
    assert not long
