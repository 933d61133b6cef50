"""What a module or function says of itself, also where Python has left docstrings out (-OO)."""

import ast
import inspect
import sys
from collections.abc import Callable
from types import ModuleType


def docstring(of: ModuleType | Callable[..., object]) -> str:
    """The docstring, from the source where it is not at hand; "" where there is neither."""
    if of.__doc__ or (isinstance(of, ModuleType) and not of.__file__):
        return inspect.cleandoc(of.__doc__ or "")
    module = of if isinstance(of, ModuleType) else sys.modules[of.__module__]
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # installed without its source
        return ""
    if isinstance(of, ModuleType):
        return ast.get_docstring(tree) or ""
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    function = next((node for node in functions if node.name == of.__name__), None)
    return "" if function is None else ast.get_docstring(function) or ""


def opening(of: ModuleType | Callable[..., object]) -> str:
    """The first line of its docstring, or "(no description)"."""
    return next(iter(docstring(of).splitlines()), "(no description)")
