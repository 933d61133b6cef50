"""Base models and their tokenizers: from a folder, the hub, a GGUF file or the package."""

from typing import TYPE_CHECKING, Any

from fedalt.models.errors import ModelError

if TYPE_CHECKING:
    from fedalt.models.base import Base, load_base

__all__ = ["Base", "ModelError", "load_base"]


def __getattr__(name: str) -> Any:
    """`Base` and `load_base`, with which torch and transformers come: a command may do without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedalt.models import base

    return getattr(base, name)
