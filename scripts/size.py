"""How large the parts of the package are, what they lean on, and whether they keep their limits.

    python scripts/size.py            # the figures
    python scripts/size.py --check    # exit code 1 where a limit is exceeded; `make lint` calls it

Lines of code leave out blank lines, comments and docstrings.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "fedalt"
# What is allowed at most. A limit that is not reached yet stands where the package stands.
FILE_LINES = 300
FUNCTION_LINES = 60
METHOD_CODE_LINES = 90
ROOT_MODULES = 5
PRIVATE_NAMES = 15
# What Flower's documents call its interface; everything else of it may change with any release.
FLOWER_PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation")


@dataclass(frozen=True)
class Part:
    """A file or function, and its lines."""

    name: str
    lines: int


def code_lines(source: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    tree = ast.parse(source)
    documents: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case (
                ast.Module(body=[ast.Expr(value=ast.Constant(value=str())) as text, *_])
                | ast.ClassDef(body=[ast.Expr(value=ast.Constant(value=str())) as text, *_])
                | ast.FunctionDef(body=[ast.Expr(value=ast.Constant(value=str())) as text, *_])
                | ast.AsyncFunctionDef(body=[ast.Expr(value=ast.Constant(value=str())) as text, *_])
            ):
                documents.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documents
        for number, line in enumerate(source.splitlines(), 1)
    )


def functions(path: Path) -> Iterator[Part]:
    """Every function of a file with its lines, decorators left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Part(f"{path.relative_to(PACKAGE)}:{node.name}", lines)


def private_names(path: Path) -> set[tuple[str, str]]:
    """Which names a file imports of which modules of Flower that are not its public interface."""
    return {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flwr")
        if node.module not in FLOWER_PUBLIC
        for alias in node.names
    }


def largest(parts: list[Part], limit: int) -> list[Part]:
    """Those above a limit, or the largest one."""
    ordered = sorted(parts, key=lambda part: -part.lines)
    return [part for part in ordered if part.lines > limit] or ordered[:1]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail where a limit is exceeded")
    check = parser.parse_args().check
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if "assets" not in path.parts]
    files = [
        Part(str(path.relative_to(PACKAGE)), len(path.read_text(encoding="utf-8").splitlines()))
        for path in paths
    ]
    methods = [
        Part(path.name, code_lines(path.read_text(encoding="utf-8")))
        for path in paths
        if path.parent.name == "methods"
    ]
    root = [Part(path.name, 0) for path in paths if path.parent == PACKAGE]
    print(f"src/fedalt: {len(files)} files, {sum(part.lines for part in files)} lines")
    failed = False
    for what, parts, limit in (
        ("lines of a file", files, FILE_LINES),
        (
            "lines of a function",
            [part for path in paths for part in functions(path)],
            FUNCTION_LINES,
        ),
        ("lines of code of a file of methods/", methods, METHOD_CODE_LINES),
    ):
        found = largest(parts, limit)
        failed |= found[0].lines > limit
        names = ", ".join(f"{part.name} {part.lines}" for part in found)
        print(f"{what}, at most {limit}: {names}")
    print(f"modules at the root, at most {ROOT_MODULES}: {len(root)}")
    failed |= len(root) > ROOT_MODULES
    private = {name for path in paths for name in private_names(path)}
    modules = len({module for module, _ in private})
    print(f"private names of Flower, at most {PRIVATE_NAMES}: {len(private)} of {modules} modules")
    failed |= len(private) > PRIVATE_NAMES
    sys.exit(check and failed)


if __name__ == "__main__":
    main()
