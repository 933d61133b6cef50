"""Processes of one machine have the base model's weights in memory once."""

import copy
from pathlib import Path

import pytest
import tiny
import torch

from fedalt.models.shared import map_weights, shared_weights

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="memory without a name is Linux's"
)


def mapped() -> int:
    """How often this process has mapped shared weights."""
    return Path("/proc/self/maps").read_text().count("memfd:fedalt-weights")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(8)[None]).logits


def test_a_model_computes_the_same_with_the_weights_of_another() -> None:
    first = tiny.llama()
    second, wanted = copy.deepcopy(first), logits(first)
    for weight in second.parameters():
        weight.data.zero_()
    before = mapped()
    with shared_weights(first) as place:
        map_weights(second, place)
    assert mapped() == before + 2
    assert torch.equal(logits(first), wanted)  # the place is closed, the memory stays
    assert torch.equal(logits(second), wanted)


def test_the_weights_lie_in_memory_once_and_nobody_changes_those_of_another() -> None:
    first = tiny.llama()
    second = copy.deepcopy(first)
    with shared_weights(first) as place:
        map_weights(second, place)
    mine, theirs = (model.get_input_embeddings().weight.data for model in (first, second))
    mine[0, 0] = 5.0
    assert theirs[0, 0] == 5.0
    theirs[0, 1] = 7.0
    assert mine[0, 1] != 7.0


def test_tied_weights_stay_tied() -> None:
    model = tiny.gpt2()
    with shared_weights(model):
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        assert inputs.weight.data_ptr() == outputs.weight.data_ptr()


def test_what_cannot_be_shared_stays_as_it_is() -> None:
    model = tiny.llama().half()
    pointers = [weight.data_ptr() for weight in model.parameters()]
    with shared_weights(model) as place:
        assert place == ""
        map_weights(model, place)
    assert [weight.data_ptr() for weight in model.parameters()] == pointers
