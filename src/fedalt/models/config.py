"""A base model's configuration as fedalt uses it: no dropout, the labels of the data."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import AutoConfig

from fedalt.models.errors import ModelError, in_short
from fedalt.models.folder import require_no_own_config_code


def network_config(name: str, place: str, labels: Sequence[str]) -> Any:
    """The configuration of a model that is to write text, or to classify where there are labels.

    Raises ModelError, also for one that needs code of its own, and for encoder-decoders that are to
    write text.
    """
    require_no_own_config_code(place, name)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # a config.json may hold anything
        raise ModelError(f"cannot load the model {name!r}: {in_short(error)}") from error
    if getattr(config, "is_encoder_decoder", False) and not labels:
        raise ModelError(
            f"the model {name!r} is an encoder-decoder ({config.model_type}); expected a causal "
            "language model, or data with labels"
        )
    for part in _parts(config):
        for key, value in part.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def set_padding(config: Any, pad: int | None) -> None:
    """Name a token for padding where a configuration names none: classifiers look for it."""
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = pad


def set_labels(config: Any, labels: Sequence[str]) -> None:
    """Let a configuration be that of a classifier for these labels."""
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: at for at, label in enumerate(labels)}


def own_labels(config: Any) -> tuple[str, ...]:
    """The labels that a checkpoint was fine-tuned for; none where it is no classifier."""
    kinds = map(str, config.architectures or ())
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        return ()
    return tuple(str(label) for _, label in sorted(config.id2label.items()))


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)
