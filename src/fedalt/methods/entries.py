"""Methods by name, each imported when it is asked for: a list of them needs no tensor library."""

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedalt.methods.contract import AnyMethod


@dataclass(frozen=True)
class Entry:
    """The class of a method, by its module in this package, and what tells variants of it apart.

    `fixed` are arguments of the class; its field `variant` is set here and nowhere else.
    `ablations` is the class that takes over where one of its further settings is given.
    `local_only`: nobody uploads anything.
    """

    module: str
    name: str
    fixed: Mapping[str, object] = field(default_factory=dict)
    ablations: "Entry | None" = None
    local_only: bool = False

    @property
    def title(self) -> str:
        """The first line of the module's docstring."""
        return (ast.get_docstring(self._source) or "(no description)").splitlines()[0]

    @property
    def settings(self) -> dict[str, object]:
        """The method's own settings and their defaults, those of its ablations included."""
        further = self.ablations.settings if self.ablations else {}
        return {**self._own_settings, **further}

    def method(self, given: Collection[str] = ()) -> "AnyMethod":
        """The method with its defaults; `given` are the settings that will be set."""
        if self.ablations and not self._own_settings.keys() >= set(given):
            return self.ablations.method()
        cls = getattr(import_module(f"{__package__}.{self.module}"), self.name)
        method: AnyMethod = cls(**self.fixed)
        return method

    def is_of(self, method: "AnyMethod") -> bool:
        """Whether a method, whatever its settings, is listed by this entry."""
        cls, variant = type(method), vars(method).get("variant")
        place = f"{__package__}.{self.module}", self.name, self.fixed.get("variant")
        is_own = (cls.__module__, cls.__qualname__, variant) == place
        return is_own or (self.ablations is not None and self.ablations.is_of(method))

    @cached_property
    def _own_settings(self) -> dict[str, object]:
        """Read from the source, since importing it would import torch."""
        classes = (node for node in self._source.body if isinstance(node, ast.ClassDef))
        defaults: dict[str, object] = {}
        for node in next(node.body for node in classes if node.name == self.name):
            match node:
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    # The only calls among defaults are Lora() and field(default_factory=dict).
                    defaults[name] = {} if isinstance(value, ast.Call) else ast.literal_eval(value)
        known = {**defaults, **self.fixed}
        return {name: known[name] for name in known if name not in ("lora", "variant")}

    @cached_property
    def _source(self) -> ast.Module:
        return ast.parse((Path(__file__).parent / f"{self.module}.py").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Methods(Mapping[str, "AnyMethod"]):
    """Methods with their defaults, by name; `entries` describe them without importing any."""

    entries: Mapping[str, Entry]

    def __getitem__(self, name: str) -> "AnyMethod":
        return self.entries[name].method()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def name_of(self, method: "AnyMethod") -> str:
        """The name under which a method is listed, whatever its settings."""
        return next(name for name, entry in self.entries.items() if entry.is_of(method))

    def is_local_only(self, method: "AnyMethod") -> bool:
        """Whether clients train alone, so that a local-only baseline beside it says nothing."""
        return self.entries[self.name_of(method)].local_only
