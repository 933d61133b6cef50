"""Evaluation of a client's model by lm-evaluation-harness, on its tasks or on local task files."""

import difflib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from transformers import GenerationConfig

from fedalt.adapters.plan import Similarity
from fedalt.core import tree as trees
from fedalt.data.chat_template import with_a_fixed_day
from fedalt.evaluation.asking import ends
from fedalt.runs.answers import Served

_SEED: Final = 1234  # of the examples in a prompt, as the harness has it


class HarnessError(ValueError):
    """A task that cannot be had, or a model that the harness cannot ask."""


@dataclass(frozen=True)
class Measured:
    """One number of a task; `error` is its standard error, None where the harness gives none."""

    task: str
    metric: str
    value: float
    error: float | None


def load_tasks(names: Sequence[str], include: Path | None) -> Mapping[str, Any]:
    """The harness's tasks of these names, and with `include` those of a folder of task files.

    Raises HarnessError. Nothing of a base model is needed, so mistakes show before one is loaded.
    """
    if find_spec("lm_eval") is None:
        raise HarnessError("lm-evaluation-harness is missing: `pip install 'fedalt[lm-eval]'`")
    if include is not None and not include.is_dir():
        raise HarnessError(f"--include-path {include}: expected a folder of task files")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=include, include_defaults=False)
    if any(name not in manager.task_index for name in names):
        manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            close = difflib.get_close_matches(name, manager.task_index, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise HarnessError(
                f"--lm-eval {name}: neither a task of lm-evaluation-harness or of --include-path, "
                f"nor a task file{hint}"
            )
    try:
        tasks: Mapping[str, Any] = manager.load(list(names))
    except Exception as error:  # a task file may name any data, and may be wrong in any way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise HarnessError(f"--lm-eval {','.join(names)}: cannot be loaded: {lines[0]}") from error
    return tasks


def require_askable(of: Served) -> None:
    """Raise HarnessError for a model that lm-evaluation-harness cannot ask."""
    if of.parts.base.adapted.heads:
        raise HarnessError("lm-evaluation-harness asks causal models; this one is a classifier")
    if isinstance(of.serving.plan.combine, Similarity):
        raise HarnessError(
            "this client weighs its adapters anew for every prompt, which lm-evaluation-harness "
            "does not tell; expected --column shared, or another method"
        )


def measure(of: Served, tasks: Mapping[str, Any]) -> list[Measured]:
    """Run loaded tasks on a client's model, its mixer or router included.

    Prompts are those of the task; for a client whose records are conversations they go through the
    chat template. See `require_askable`.
    """
    base, serving = of.parts.base, of.serving
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    tree = trees.on(serving.tree, base.adapted.device)
    with base.adapted.bound(serving.plan, tree) as model, _as_served(of):
        asked = HFLM(
            pretrained=model,
            tokenizer=base.tokenizer,
            max_length=base.positions,
            batch_size=of.parts.settings.scoring.batch_size,
        )
        with redirect_stdout(sys.stderr):  # it prints, where our own result belongs
            found = lm_eval.evaluate(
                asked, tasks, log_samples=False, apply_chat_template=of.form == "messages"
            )
    return [
        Measured(task, key.removesuffix(",none"), float(value), _error(metrics, key))
        for task, metrics in found["results"].items()
        for key, value in metrics.items()
        if isinstance(value, int | float) and "," in key and "_stderr," not in key
    ]


@contextmanager
def _as_served(of: Served) -> Iterator[None]:
    """Within this context the harness finds what serving goes by, where it asks by itself.

    Every end token ends an answer, nothing else of the model's own generation configuration takes
    part, and a chat template tells the day that it told in training.
    """
    base = of.parts.base
    model, tokenizer = base.adapted.model, base.tokenizer
    card, template = model.generation_config, tokenizer.chat_template
    model.generation_config = GenerationConfig(
        eos_token_id=list(ends(base)) or None, pad_token_id=base.pad_id
    )
    if of.form == "messages":
        tokenizer.chat_template = with_a_fixed_day(tokenizer.get_chat_template())
    try:
        yield
    finally:
        model.generation_config, tokenizer.chat_template = card, template


def _error(metrics: Mapping[str, Any], key: str) -> float | None:
    name, _, kind = key.partition(",")
    error = metrics.get(f"{name}_stderr,{kind}")
    return float(error) if isinstance(error, int | float) else None
