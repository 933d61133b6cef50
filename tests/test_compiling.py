"""Parts of a model that torch compiles compute what they did; where it cannot, nothing changes."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bases import base_of, example, random_serving_tree
from tiny import CAUSAL, tokens

from fedalt.adapters.compiling import Compiled, try_compiling
from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import Mixer, Plan, Slot, names_of
from fedalt.models import Base
from fedalt.training.group import Share, Trained, Training
from fedalt.training.loop import train_together
from fedalt.training.orders import Fit

compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler"
)
SLOTS = (Slot("individual", 2, 4), Slot("rest_of_world", 2, 4))
MIXED = Plan(SLOTS, Mixer(), dropout=0.1)
CLIENTS = [
    [example("abc", "xy"), example("the quick brown fox", "jumps")],
    [example("hello there", "general"), example("one two three", "four")],
]
FAST = Training(lr=1e-2, batch_size=1, local_epochs=1)


def compiled_of(base: Base) -> Base:
    """The same base model, some parts compiled."""
    model = CAUSAL["llama"]()
    model.load_state_dict(base_model_state(base))
    return replace(base, adapted=AdaptedModel(model, compile_parts=True))


def base_model_state(base: Base) -> dict[str, torch.Tensor]:
    """Its weights by the names they had before layers were wrapped."""
    state = base.adapted.model.state_dict()
    return {name.replace(".base_layer", ""): weight for name, weight in state.items()}


def trained(base: Base, training: Training) -> list[Trained]:
    """Both clients after two steps."""
    tree = random_serving_tree(base, MIXED)
    order = Fit(MIXED, tree, names_of(tree, "individual", "mixer"))
    return train_together(base, [Share(order, each, 7) for each in CLIENTS], training)


@compiler
def test_training_with_compiled_parts_moves_every_number_the_same_way() -> None:
    plain = base_of(CAUSAL["llama"]())
    faster = compiled_of(plain)
    assert faster.adapted.compiled == Compiled(("rotary embeddings", "gates", "norms"))
    assert faster.adapted.packs.longest > 0
    wanted = trained(plain, FAST)
    for training in (FAST, replace(FAST, gradient_checkpointing=True)):
        for one, other in zip(trained(faster, training), wanted, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5)
            for name, tensor in one.tree.items():
                torch.testing.assert_close(tensor, other.tree[name], rtol=1e-4, atol=1e-4)


@compiler
def test_compiled_parts_take_any_number_of_texts_and_tokens() -> None:
    plain = base_of(CAUSAL["llama"]())
    faster = compiled_of(plain)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for batch, length in ((1, 9), (3, 5), (2, 12), (5, 31)):
            ids = tokens(batch, length)
            one, other = (each.adapted.model(ids).logits for each in (faster, plain))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    # Of three kinds of parts, each without gradients, and rotary embeddings for one text and more.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 4


@compiler
def test_compiling_leaves_classes_and_weights_alone() -> None:
    model, other = CAUSAL["llama"](), CAUSAL["llama"]()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert try_compiling(model).parts
    assert "forward" in vars(model.model.norm)
    assert "forward" not in vars(other.model.norm)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_architecture_without_such_parts_stays_as_it_is() -> None:
    assert try_compiling(CAUSAL["gpt2"]()) == Compiled(
        (), "no part of this architecture is known to gain from it"
    )


def test_without_a_compiler_a_run_says_so_and_trains_as_ever(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data = tmp_path / "data.jsonl"
    lines = [f'{{"who": "{who}", "prompt": "a", "completion": "b"}}\n' for who in "xy" * 4]
    data.write_text("".join(lines))
    flags = (
        f"--data {data} --client-field who --model {tiny_model_dir} --device cpu --compile "
        f"--rounds 1 --no-yardstick --no-test --out {tmp_path / 'run'}"
    )
    nowhere = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-m", "fedalt", "run", *flags.split()],
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (line,) = [each for each in run.stderr.splitlines() if "nothing is compiled" in each]
    assert "compiler" in line
    assert "compile = true" in (tmp_path / "run" / "settings.toml").read_text()
