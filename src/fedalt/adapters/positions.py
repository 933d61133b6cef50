"""How many tokens of one text a model can number."""

from typing import Final

from torch import nn
from transformers import PreTrainedModel

# What models call a table with a row for each position.
_TABLES: Final = ("position_embeddings", "embed_positions", "wpe", "position_embedding")


def positions_of(model: PreTrainedModel) -> int | None:
    """The most tokens of one text; None for a model that sets no bound.

    Where positions are looked up in a table its rows count, not what the configuration says: those
    up to a padding id stand for no position, nor do rows that are skipped. Tables of other parts,
    such as a vision tower's, number no text.
    """
    config = model.config.get_text_config(decoder=True)
    said = [getattr(config, "max_position_embeddings", None)]
    texts = _place_of_texts(model)
    for path, module in model.named_modules():
        if not path.startswith(texts):
            continue
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _TABLES:
            skipped = getattr(module, "offset", 0)
            if module.padding_idx is not None:
                skipped = max(skipped, module.padding_idx + 1)
            said.append(module.num_embeddings - skipped)
    return min((length for length in said if isinstance(length, int) and length > 0), default=None)


def _place_of_texts(model: PreTrainedModel) -> str:
    """How the paths begin of what lies beside the table of tokens; "" where there is none."""
    try:
        tokens = model.get_input_embeddings()
    except NotImplementedError:
        return ""
    path = next((path for path, module in model.named_modules() if module is tokens), "")
    return path.rpartition(".")[0]
