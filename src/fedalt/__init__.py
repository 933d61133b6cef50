"""Personalised federated fine-tuning of language models with low-rank adapters."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["load"]
__version__ = "0.1.0"


def load(path: str | Path, *, device: str | None = None) -> "PeftModel":
    """The personalised model in an exported folder, with a working `generate`.

    `transformers.AutoTokenizer.from_pretrained(path)` gives its tokenizer. Raises ValueError.
    """
    from fedalt.export.loading import load as load_folder

    return load_folder(path, device=device)


# After `import fedalt`, PEFT alone can load an exported folder. Only importing PEFT takes seconds:
# the `fedalt` command, whose process nobody imports PEFT into, does without.
if Path(*sys.argv[:1]).stem != "fedalt":
    from fedalt.export.peft_type import register

    register()
    del register
