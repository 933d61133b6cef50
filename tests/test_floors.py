"""A module imports from its own floor and from lower ones, never upward and never in a circle."""

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from size import PACKAGE, code_lines, private_names

FLOORS = {
    "core": 0,
    "metrics": 0,
    "data": 1,
    "adapters": 1,
    "models": 2,
    "training": 3,
    "methods": 4,
    "evaluation": 5,
    "engine": 6,
    "runs": 7,
    "report": 8,
    "export": 8,
    "peft": 9,
    "federation": 9,
    "flower": 10,
    "api": 11,
    "serving": 11,
    "cli": 12,
    "__main__": 13,
    "": 14,  # the package's own __init__: it may offer anything, and nothing here may import it
}


def unit(module: str) -> str:
    """The file or folder right below the package: `fedalt.methods.lora` is part of `methods`."""
    return module.split(".")[1] if "." in module else ""


def read_package() -> dict[str, str]:
    """The source of every module by its name; a package stands for its __init__."""
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("fedalt", *path.relative_to(PACKAGE).with_suffix("").parts)
        sources[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return sources


def imports(module: str, sources: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """Line and name of every module imported anywhere in a module, inside functions too.

    `from fedalt import core` imports `fedalt.core`; `from fedalt import load` imports `fedalt`.
    """
    is_package = any(other.startswith(f"{module}.") for other in sources)
    for node in ast.walk(ast.parse(sources[module])):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level + is_package or None]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole in sources else base


def problems(sources: Mapping[str, str]) -> list[str]:
    """Everything that breaks the order of the floors."""
    found = []
    modules: dict[str, set[str]] = {}
    units: dict[str, set[str]] = {}
    for module in sources:
        if unit(module) not in FLOORS:
            found.append(f"{module} is on no floor")
            continue
        own = FLOORS[unit(module)]
        for line, target in imports(module, sources):
            place = f"{module}:{line}"
            if target.split(".")[0] == "flwr" and unit(module) != "flower":
                found.append(f"{place} imports {target}, which only fedalt.flower may")
            if target.split(".")[0] != "fedalt":
                continue
            if target not in sources:
                found.append(f"{place} imports {target}, which does not exist")
            elif unit(target) in FLOORS and FLOORS[unit(target)] > own:
                found.append(f"{place} (floor {own}) imports {target} upward")
            modules.setdefault(module, set()).add(target)
            if unit(target) != unit(module):
                units.setdefault(unit(module), set()).add(unit(target))
    for what, graph in (("modules", modules), ("floors' parts", units)):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append(f"{what} in a circle: {' <- '.join(error.args[1])}")
    return found


def test_the_package_keeps_its_floors() -> None:
    sources = read_package()
    assert {
        "fedalt.core",
        "fedalt.core.codec",
        "fedalt.methods",
        "fedalt.methods.lora",
    } <= set(sources)
    assert problems(sources) == []


def test_assets_hold_no_code() -> None:
    assert not list((PACKAGE / "assets").rglob("*.py"))


CLEAN = {
    "fedalt": "def load(path):\n    from fedalt.cli import main\n",
    "fedalt.core": "import torch\n",
    "fedalt.adapters": "",
    "fedalt.adapters.plan": "from fedalt.core import Name\n",
    "fedalt.adapters.layer": "from fedalt.adapters.plan import Plan\nfrom fedalt import core\n",
    "fedalt.evaluation": "",
    "fedalt.engine.rounds": "from fedalt.evaluation import score\n",
    "fedalt.flower.app": "import flwr.server\n",
    "fedalt.cli": "from fedalt.adapters import layer\n",
}


def test_clean_sources_have_no_problems() -> None:
    assert problems(CLEAN) == []


@pytest.mark.parametrize(
    ("module", "line", "problem"),
    [
        (
            "fedalt.core",
            "from fedalt.adapters.plan import Plan",
            "fedalt.adapters.plan upward",
        ),
        ("fedalt.core", "import fedalt.adapters.plan", "fedalt.adapters.plan upward"),
        ("fedalt.core", "import torch, fedalt.cli as c", "fedalt.cli upward"),
        ("fedalt.core", "from fedalt import adapters", "fedalt.adapters upward"),
        ("fedalt.core", "from fedalt.adapters import plan", "fedalt.adapters.plan upward"),
        ("fedalt.core", "from . import cli", "fedalt.cli upward"),
        ("fedalt.core", "from .adapters.plan import Plan", "fedalt.adapters.plan upward"),
        (
            "fedalt.core",
            "def f():\n    from fedalt.cli import main",
            "(floor 0) imports fedalt.cli",
        ),
        ("fedalt.core", "if x:\n    import fedalt.cli", "(floor 0) imports fedalt.cli upward"),
        ("fedalt.adapters", "from ..cli import main", "fedalt.cli upward"),
        ("fedalt.adapters", "from .. import evaluation", "fedalt.evaluation upward"),
        ("fedalt.adapters.plan", "from ..cli import main", "fedalt.cli upward"),
        ("fedalt.cli", "from fedalt import load", "imports fedalt upward"),
        ("fedalt.cli", "import fedalt", "imports fedalt upward"),
        ("fedalt.cli", "import fedalt.gone", "fedalt.gone, which does not exist"),
        ("fedalt.engine.rounds", "from fedalt.flower import app", "upward"),
        ("fedalt.engine.rounds", "import flwr", "flwr, which only fedalt.flower may"),
        ("fedalt.cli", "from flwr.server import App", "flwr.server, which only"),
        ("fedalt.utils", "", "fedalt.utils is on no floor"),
        ("fedalt.assets.code", "", "fedalt.assets.code is on no floor"),
        ("fedalt.adapters.plan", "from .layer import Layer", "modules in a circle"),
        ("fedalt.adapters.plan", "from fedalt.adapters.plan import x", "modules in a circle"),
        ("fedalt.evaluation", "from fedalt.engine import rounds", "parts in a circle"),
    ],
)
def test_a_planted_import_is_found(module: str, line: str, problem: str) -> None:
    assert any(problem in each for each in problems({**CLEAN, module: line + "\n"}))


def test_parts_that_import_each_other_are_a_circle_even_if_their_modules_are_not() -> None:
    sources = {
        **CLEAN,
        "fedalt.report.page": "from fedalt.export.card import Card\n",
        "fedalt.report.table": "",
        "fedalt.export.card": "",
        "fedalt.export.folders": "from fedalt.report.table import draw\n",
    }
    (circle,) = problems(sources)
    assert circle.startswith("floors' parts in a circle")
    assert "export <- report" in circle


POSIX = {"fcntl", "grp", "pwd", "resource", "termios", "tty"}


def test_only_the_servers_gateway_needs_posix_to_be_imported() -> None:
    needing = {
        module
        for module, source in read_package().items()
        for node in ast.parse(source).body
        if isinstance(node, ast.Import) and POSIX & {alias.name for alias in node.names}
    }
    assert needing == {"fedalt.flower.gateway"}


def test_the_names_of_flower_that_are_not_public_are_as_many_as_the_documents_say() -> None:
    used = {name for path in PACKAGE.rglob("*.py") for name in private_names(path)}
    modules = {module for module, _ in used}
    text = (PACKAGE.parents[1] / "docs" / "deployment.md").read_text()
    assert f"{len(used)} names from {len(modules)} of its internal modules" in text


@pytest.mark.parametrize("word", ["def", "async def"])
def test_what_documents_a_function_is_no_line_of_code(word):
    assert code_lines(f'{word} act():\n    """What it does."""\n    return 1\n') == 2
