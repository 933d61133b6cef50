"""Personalised federated fine-tuning of language models with low-rank adapters."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedalt.core.threads import spin_briefly

if TYPE_CHECKING:
    from peft import PeftModel

    from fedalt.api import Run, open_run, run

__all__ = ["Run", "load", "open_run", "run"]
__version__ = "0.1.0"

# Whichever module of fedalt a process imports first, this runs before it and before torch.
spin_briefly()


def load(path: str | Path, *, device: str | None = None) -> "PeftModel":
    """The personalised model in an exported folder, with a working `generate`.

    `transformers.AutoTokenizer.from_pretrained(path)` gives its tokenizer. Raises ValueError.
    """
    from fedalt.export.loading import load as load_folder

    return load_folder(path, device=device)


def __getattr__(name: str) -> Any:
    """Import the rest when it is asked for, so that `import fedalt` itself is quick (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedalt import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """Names for completion, those that are not imported yet too."""
    return sorted({*globals(), *__all__})
