"""Base models and their tokenizers: from a folder, the hub, a GGUF file or the package."""

from fedalt.models.base import Base, load_base
from fedalt.models.errors import ModelError

__all__ = ["Base", "ModelError", "load_base"]
