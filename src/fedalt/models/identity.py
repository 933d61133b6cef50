"""What a base model is known by: its weights, configuration, tokenizer, template and labels.

Everything that changes what the model computes or is asked counts, and nothing else: not the path,
not the library's version, not the precision it is kept in, as long as no number differs.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedalt.core.threads import cores

_CHUNK: Final = 2**20  # numbers widened at a time
_THREADS: Final = 4
# Of a configuration: what names or describes the model without changing a number of it. Dropout is
# off in every base model here, and labels are compared by themselves.
_BOOKKEEPING: Final = frozenset(
    (
        "_name_or_path",
        "_commit_hash",
        "architectures",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
PARTS: Final = ("weights", "config", "tokenizer", "chat template", "labels")


@dataclass(frozen=True)
class Identity:
    """The parts by which base models are compared.

    `weights` maps the name of every tensor to a digest of all of its numbers, `config` and
    `tokenizer` a key to its value or a digest of it; `template` is a digest of the chat template,
    "" where there is none; `labels` are a classifier's, in the order of its outputs.
    """

    weights: Mapping[str, str]
    config: Mapping[str, str]
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    template: str = ""
    labels: Sequence[str] = ()

    @property
    def short(self) -> str:
        """A short string that differs wherever a part does, and tells which."""
        parts = (self.weights, self.config, self.tokenizer, self.template, list(self.labels))
        sizes = (16, 8, 8, 8, 8)
        return "-".join(
            _digest(json.dumps(part, sort_keys=True).encode())[:size]
            for part, size in zip(parts, sizes, strict=True)
        )

    def table(self) -> dict[str, Any]:
        """As JSON holds it; `identity_in` reads it."""
        return asdict(self)


def identity_in(table: Mapping[str, Any]) -> Identity:
    """What `Identity.table` gave. Raises TypeError for another table."""
    return Identity(**table)


def differences(then: Identity, now: Identity) -> str:
    """What is another one now, part by part and by name; "" where nothing is."""
    told = []
    if other := _keys(then.weights, now.weights):
        several = f" and of {len(other) - 1} more tensors" if len(other) > 1 else ""
        told.append(f"the weights of {other[0]}{several} are others")
    for what in ("config", "tokenizer"):
        old, new = getattr(then, what), getattr(now, what)
        keys = _keys(old, new)
        said = ((key, *(part.get(key, "not there") for part in (old, new))) for key in keys[:3])
        told += [f"{what} {key} was {before}, is {after}" for key, before, after in said]
        if len(keys) > 3:
            told.append(f"{len(keys) - 3} more keys of the {what} differ")
    if then.template != now.template:
        told.append("the chat template is another one")
    if list(then.labels) != list(now.labels):
        told.append(f"the labels were {_list(then.labels)}, are {_list(now.labels)}")
    return "; ".join(told)


def parts_that_differ(then: str, now: str) -> str:
    """What two short strings tell: the names of the parts that differ."""
    before, after = then.split("-"), now.split("-")
    if len(before) != len(PARTS) or len(after) != len(PARTS):
        return "what it was known by"
    parts = zip(PARTS, before, after, strict=True)
    return ", ".join(part for part, old, new in parts if old != new)


def what_differs(then: Mapping[str, Any], now: Identity, short: str) -> str:
    """What is another base model now than a record tells; "" where nothing is.

    `then` holds a `fingerprint`, the short string, and perhaps an `identity`, the whole table;
    `short` is the fingerprint now.
    """
    if then.get("fingerprint") == short:
        return ""
    table = then.get("identity")
    told = differences(identity_in(table), now) if table else ""
    return told or (
        f"other {parts_that_differ(str(then.get('fingerprint')), short)} "
        f"(fingerprint {then.get('fingerprint')!r}, here {short!r})"
    )


def _keys(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return sorted(key for key in {*old, *new} if old.get(key) != new.get(key))


def _list(labels: Sequence[str]) -> str:
    return ", ".join(labels) or "(none)"


def identify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    labels: Sequence[str] = (),
    without: Collection[str] = (),
) -> Identity:
    """The identity of a model before it is wrapped; `without` are tensors drawn anew, not given."""
    return Identity(
        weights=_weights(model, frozenset(without)),
        config=_config(model),
        tokenizer={} if tokenizer is None else _tokenizer(tokenizer),
        template=_template(tokenizer),
        labels=tuple(labels),
    )


def _weights(model: PreTrainedModel, without: frozenset[str]) -> dict[str, str]:
    """A digest of all numbers of every tensor. One of several names of one tensor is enough."""
    once: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    for name, tensor in sorted(model.state_dict().items()):
        if name not in without and isinstance(tensor, Tensor):
            place = tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
            once.setdefault(place if tensor.numel() else (name,), (name, tensor))
    named = [(name, tensor) for name, tensor in once.values() if not _is_packed_facts(name)]
    with ThreadPoolExecutor(min(_THREADS, cores())) as threads:
        return dict(
            zip(
                [name for name, _ in named],
                threads.map(_digest_of, [tensor for _, tensor in named]),
                strict=True,
            )
        )


def _is_packed_facts(name: str) -> bool:
    """Whether it is bitsandbytes' note of a 4-bit tensor's shape and dtype, kept as a tensor."""
    return ".quant_state.bitsandbytes__" in name


def _digest_of(tensor: Tensor) -> str:
    """Of shape and numbers; half precision counts as the float32 numbers that it stands for."""
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    for chunk in _chunks(tensor.detach()):
        digest.update(chunk.numpy().tobytes())
    return digest.hexdigest()[:16]


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    for chunk in flat.split(_CHUNK) if flat.numel() else ():
        if chunk.is_floating_point() and chunk.element_size() < 4:
            chunk = chunk.float()
        yield chunk.cpu().contiguous()


def _config(model: PreTrainedModel) -> dict[str, str]:
    """Every key that counts, those of parts within it too, as JSON."""
    kind = {"model": type(model).__name__}
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is not None:
        kind["generation.eos_token_id"] = json.dumps(ends)
    return kind | dict(_flat(json.loads(json.dumps(model.config.to_dict(), default=str))))


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in sorted(table.items()):
        if key in _BOOKKEEPING or ("drop" in key and isinstance(value, float)):
            continue
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", json.dumps(value, sort_keys=True)


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Digests of what makes ids of a text, and the special tokens by name."""
    own = {
        "ids of 'a'": json.dumps(tokenizer("a").input_ids),
        "longest text": str(tokenizer.model_max_length),
    }
    own |= {
        name: f"{token!r} ({tokenizer.convert_tokens_to_ids(str(token))})"
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    own["added tokens"] = _short(
        {str(at): str(token) for at, token in tokenizer.added_tokens_decoder.items()}
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return own | {"vocabulary": _short(tokenizer.get_vocab())}
    parts = json.loads(backend.to_str())
    # Padding and truncation are set anew with every call.
    for key in ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        own["vocabulary" if key == "model" else key.replace("_", "-")] = _short(parts.get(key))
    return own


def _template(tokenizer: PreTrainedTokenizerBase | None) -> str:
    own = None if tokenizer is None else tokenizer.chat_template
    return _short(own) if own else ""


def _short(value: object) -> str:
    return _digest(json.dumps(value, sort_keys=True).encode())[:12]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
