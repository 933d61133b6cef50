"""GGUF files as base models: converted once into a folder that transformers reads in seconds.

The weights are unpacked, rounded to bfloat16 and stored as float32. A CPU computes in float32, so
it maps the file, and all processes share its pages. The tokenizer and its chat template are
those of the file. The folder lies in the user's cache, under the digest of the file's content.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from fedalt.core.files import cache_folder

SUFFIX: Final = ".gguf"
_MAGIC: Final = b"GGUF"
_FORM: Final = 5  # of a converted folder; another one is converted anew
_FACTORS: Final = "rope_freqs.weight"
# The settings of all such models but for the largest factor.
_LLAMA3: Final = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class GGUFError(ValueError):
    """A GGUF file that cannot be used, and why."""


def converted(file: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of a file's model, made if it is not there. Raises GGUFError.

    `say` is told before a conversion begins, which takes from seconds to minutes; transformers
    shows its progress.
    """
    _require_gguf(file)
    about = file.stat()
    folder = cache_folder() / "gguf" / f"{_digest(file, about.st_size, about.st_mtime_ns)}-{_FORM}"
    if not folder.is_dir():
        if find_spec("gguf") is None:
            raise GGUFError(f"{file}: reading GGUF needs a package: `pip install 'fedalt[gguf]'`")
        say(f"converting {file.name} once into {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            _convert(_apart(file, Path(unfinished)), Path(unfinished) / "model", file)
            try:
                (Path(unfinished) / "model").rename(folder)
            except OSError:  # another process was faster; it wrote the same
                if not folder.is_dir():
                    raise
    return folder


def _require_gguf(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(_MAGIC))
    except OSError as error:
        raise GGUFError(f"{file}: cannot be read: {error.strerror}") from error
    if magic != _MAGIC:
        raise GGUFError(f"{file}: not a GGUF file: it begins with {magic!r}, expected {_MAGIC!r}")


@cache
def _digest(file: Path, size: int, changed: int) -> str:  # noqa: ARG001 - they make the cache right
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:32]


def _apart(file: Path, folder: Path) -> Path:
    """The file in a folder of its own: transformers takes what lies beside it for parts of it."""
    alone = folder / "file" / file.name
    alone.parent.mkdir()
    try:
        alone.symlink_to(file.resolve())
    except OSError:  # Windows lets not everyone make links
        shutil.copyfile(file, alone)
    return alone


def _convert(file: Path, folder: Path, named: Path) -> None:
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    place = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **place,
        )
        _require_all_weights(report)
        reader = gguf.GGUFReader(file)
        _require_no_other_bias(reader, model)
        if (rotations := _rotations_of(reader, model.config)) is not None:
            model.config.rope_parameters = rotations
        model.to(torch.bfloat16).float().save_pretrained(folder)
        model.config.dtype = torch.bfloat16  # what a GPU computes in
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # whatever a broken file does to the library that reads it
        shutil.rmtree(folder, ignore_errors=True)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise GGUFError(
            f"{named}: cannot be made a base model: {lines[0]}; the file is damaged or "
            "a part of a split model, or its architecture or quantisation is none that "
            "transformers can unpack"
        ) from error
    finally:
        if not shown:
            logging.disable_progress_bar()


def _require_all_weights(report: Mapping[str, Any]) -> None:
    """Raise ValueError where transformers has drawn a tensor that the file does not give."""
    wrong = {key for key, *_ in report["mismatched_keys"]}
    for keys, what in ((report["missing_keys"], "it lacks"), (wrong, "it has in another shape")):
        if keys:
            count = f"{len(keys)} tensor{'' if len(keys) == 1 else 's'}"
            raise ValueError(f"{what} {count}, first {min(keys)}")


def _require_no_other_bias(reader: Any, model: Any) -> None:
    """Raise ValueError where transformers has left a bias of the file aside, as the model has none.

    Experts' biases are left out: transformers joins some of them.
    """
    given = [t.name for t in reader.tensors if t.name.endswith(".bias") and "exps" not in t.name]
    taken = sum(name.endswith(".bias") for name in model.state_dict())
    if len(given) > taken:
        raise ValueError(
            f"it has {len(given)} biases, such as {min(given)}, but a model of this architecture "
            f"takes {taken}"
        )


def _rotations_of(reader: Any, config: Any) -> dict[str, Any] | None:
    """The `rope_parameters` with which transformers computes what the file means; None: as read.

    Transformers leaves RoPE scaling aside when it unpacks a file. Llama 3.1 and its kin divide each
    frequency by a factor of its own, `rope_freqs.weight`. `reader` is a
    `gguf.GGUFReader`, `config` what transformers has read of the file. Raises ValueError for
    rotations that it cannot be given.
    """
    for key, field in reader.fields.items():
        plain = {".rope.scaling.type": "none", ".rope.scale_linear": 1.0}
        for end, usual in plain.items():
            if key.endswith(end) and field.contents() != usual:
                raise ValueError(f"its {key} is {field.contents()!r}, expected {usual!r} or none")
    scaled = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith("rope_")}
    if not scaled:
        return None
    if set(scaled) != {_FACTORS}:
        raise ValueError(f"it has {min(scaled)}, which transformers cannot use")
    factors = torch.tensor(scaled[_FACTORS].data.copy()).float()
    wanted = {**config.rope_parameters, **_LLAMA3, "factor": float(factors.max())}
    if not torch.allclose(_factors(config, wanted, len(factors)), factors, rtol=1e-3):
        raise ValueError(f"its {_FACTORS} is not that of Llama 3.1, which transformers can use")
    return wanted


def _factors(config: Any, rotations: dict[str, Any], count: int) -> torch.Tensor:
    """What these rotations divide the plain frequencies by; NaN where there are not so many."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tried = deepcopy(config)
    tried.rope_parameters = rotations
    frequencies: torch.Tensor = ROPE_INIT_FUNCTIONS["llama3"](tried, torch.device("cpu"))[0]
    if len(frequencies) != count:
        return torch.full((count,), torch.nan)
    plain = torch.pow(float(rotations["rope_theta"]), -torch.arange(count) / count)
    return plain / frequencies
