"""A base model is known by everything that changes what it computes or is asked, and by no more."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bases import letters
from models_on_disk import edit_json, edit_weights
from runs_for_tests import save_model, settings_for, write_clients
from safetensors.torch import load_file

import fedalt
from fedalt.models.base import load_base
from fedalt.models.identity import differences, identify, parts_that_differ
from fedalt.runs.answers import served
from fedalt.runs.folder import StoreError
from fedalt.runs.lifecycle import reopen, start_run
from fedalt.runs.membership import join
from fedalt.runs.setup import prepare

DOWN = "model.layers.1.mlp.down_proj.weight"


def last_number(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors[DOWN][-1, -1] += 0.5
    return tensors


def with_template(folder: Path) -> None:
    tokenizer = letters()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)


def other_normalizer(folder: Path) -> None:
    edit_json(folder, "tokenizer.json", normalizer={"type": "Lowercase"})


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "the last number of a tensor": (
        lambda f: edit_weights(f, last_number),
        f"the weights of {DOWN} are others",
    ),
    "rope": (
        lambda f: edit_json(f, "config.json", rope_parameters=ROPE),
        "config rope_parameters.rope_theta was 10000.0, is 500000.0",
    ),
    "norm": (
        lambda f: edit_json(f, "config.json", rms_norm_eps=1e-3),
        "config rms_norm_eps was 1e-06, is 0.001",
    ),
    "activation": (
        lambda f: edit_json(f, "config.json", hidden_act="gelu"),
        'config hidden_act was "silu", is "gelu"',
    ),
    "ends": (
        lambda f: edit_json(f, "generation_config.json", eos_token_id=[2, 5]),
        "config generation.eos_token_id was 2, is [2, 5]",
    ),
    "template": (with_template, "the chat template is another one"),
    "normalizer": (other_normalizer, "tokenizer normalizer was"),
    "special token": (
        lambda f: edit_json(f, "tokenizer_config.json", eos_token="<s>"),
        "tokenizer eos_token was '</s>' (2), is '<s>' (1)",
    ),
}
ROPE = {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize(("change", "told"), CHANGES.values(), ids=CHANGES)
def test_what_changes_the_model_is_told_by_name(
    change: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model")
    then = load_base(str(folder), device="cpu")
    change(folder)
    now = load_base(str(folder), device="cpu")
    assert now.fingerprint != then.fingerprint
    assert then.identity is not None
    assert now.identity is not None
    assert differences(then.identity, now.identity).startswith(told)


def test_bookkeeping_does_not_count(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    then = load_base(str(folder), device="cpu")
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    edit_json(moved, "config.json", transformers_version="0", attention_dropout=0.3)
    edit_json(moved, "config.json", use_cache=True, dtype="bfloat16", _name_or_path="x")
    assert load_base(str(moved), device="cpu").fingerprint == then.fingerprint


def test_half_precision_is_known_as_what_it_is_widened_to(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    edit_weights(folder, lambda each: {name: t.bfloat16() for name, t in each.items()})
    from transformers import AutoModelForCausalLM

    narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert next(iter(narrow.parameters())).dtype == torch.bfloat16
    assert identify(narrow) == identify(wide)


def test_short_strings_name_the_parts_that_differ() -> None:
    assert parts_that_differ("1-2-3-4-5", "1-0-3-0-5") == "config, chat template"


def test_a_classifier_is_the_same_in_every_process(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    code = (
        "import sys, torch\nfrom fedalt.models.base import load_base\ntorch.manual_seed(5)\n"
        "print(load_base(sys.argv[1], labels=('a', 'b'), device='cpu').fingerprint)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True
    )
    torch.manual_seed(6)
    base = load_base(str(folder), labels=("a", "b"), device="cpu")
    assert base.fingerprint == out.stdout.strip()
    assert load_base(str(folder), labels=("b", "a"), device="cpu").fingerprint != base.fingerprint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of one round, and its base model with one number changed since."""
    folder = tmp_path_factory.mktemp("trained")
    model = save_model(folder / "model")
    data = write_clients(folder / "data", clients=("a", "b"), count=4)
    settings = settings_for(model, data, rounds={"rounds": 1})
    start_run(prepare(settings), folder / "run")
    fedalt.open_run(folder / "run").export("a", folder / "exported")
    edit_weights(model, last_number)
    return folder / "run", model


def test_whatever_opens_a_run_refuses_another_base(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    run, _ = trained
    told = rf"began with another base model than .*: the weights of {DOWN} are others$"
    newcomer = write_clients(tmp_path / "new", clients=("d",), count=4)
    for act in (
        lambda: reopen(run),
        lambda: served(run, "a"),
        lambda: fedalt.open_run(run).generate("a", "hi"),
        lambda: fedalt.open_run(run).export("a", tmp_path / "out"),
        lambda: join(run, newcomer),
    ):
        with pytest.raises(StoreError, match=told):
            act()
    assert not (tmp_path / "out").exists()


def test_an_exported_model_refuses_another_base(trained: tuple[Path, Path]) -> None:
    run, _ = trained
    told = rf"was trained on another base model than .* is now: the weights of {DOWN} are others"
    with pytest.raises(ValueError, match=told):
        fedalt.load(run.parent / "exported", device="cpu")


def test_all_numbers_count_in_every_tensor(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    then = load_base(str(folder), device="cpu").identity
    assert then is not None
    names = set(load_file(folder / "model.safetensors"))
    assert names == set(then.weights)
    edit_weights(folder, lambda each: {name: _with_other_end(t) for name, t in each.items()})
    now = load_base(str(folder), device="cpu").identity
    assert now is not None
    assert not {name for name in names if then.weights[name] == now.weights[name]}


def _with_other_end(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[-1] += 0.25
    return tensor
