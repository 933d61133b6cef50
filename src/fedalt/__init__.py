"""Personalised federated fine-tuning of language models with low-rank adapters."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedalt.api import Run, open_run, run
from fedalt.core.threads import spin_briefly

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Run", "load", "open_run", "run"]
__version__ = "0.1.0"

# Every module of fedalt comes after this one, in whichever process, and torch with them.
spin_briefly()


def load(path: str | Path, *, device: str | None = None) -> "PeftModel":
    """The personalised model in an exported folder, with a working `generate`.

    `transformers.AutoTokenizer.from_pretrained(path)` gives its tokenizer. Raises ValueError.
    """
    from fedalt.export.loading import load as load_folder

    return load_folder(path, device=device)


# After `import fedalt`, PEFT alone can load an exported folder. Only importing PEFT takes seconds:
# the `fedalt` command and our own processes, into which nobody imports PEFT, do without. While
# Python looks for the module of `python -m`, its name is "-m".
if Path(*sys.argv[:1]).stem not in ("fedalt", "-m"):
    from fedalt.export.peft_type import register

    register()
    del register
