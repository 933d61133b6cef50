"""METHODS lists every method; what it says of one without importing it is what the class has."""

import subprocess
import sys
from dataclasses import fields

import pytest

from fedalt.methods import METHODS
from fedalt.methods.checks import check
from fedalt.methods.lora import Lora

LISTING = """
import sys
sys.argv = ["fedalt"]  # the command; for others, fedalt registers with PEFT
from fedalt.methods import METHODS
print(*(f"{name}: {entry.title} {entry.settings}" for name, entry in METHODS.entries.items()))
assert not {"torch", "transformers", "sklearn"} & sys.modules.keys(), "a library was imported"
"""


def test_methods_are_listed_with_titles_and_settings_without_importing_torch():
    done = subprocess.run(
        [sys.executable, "-c", LISTING], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "FedALT: an individual adapter" in done.stdout


@pytest.mark.parametrize("name", METHODS)
def test_settings_that_are_listed_are_those_of_the_method(name):
    entry, method = METHODS.entries[name], METHODS[name]
    own = [each.name for each in fields(method) if each.name not in ("lora", "variant")]
    assert {each: entry.settings[each] for each in own} == {
        each: getattr(method, each) for each in own
    }
    assert entry.settings.keys() - own <= (
        entry.ablations.settings.keys() if entry.ablations else set()
    )
    assert METHODS.name_of(method) == name
    assert entry.title == sys.modules[type(method).__module__].__doc__.splitlines()[0]


def test_one_method_alone_is_local_only():
    assert [name for name in METHODS if METHODS.is_local_only(METHODS[name])] == ["local"]


def test_a_value_outside_its_range_is_an_error_that_names_it():
    check(Lora(), rank="[8, inf)", alpha="(31.9, inf)", dropout="[0.05, 0.06)")
    for wrong, words in (
        ({"rank": 0}, "rank=0, but it is at least 1"),
        ({"alpha": 0.0}, "alpha=0.0, but it must be above 0"),
        ({"dropout": 1.0}, "dropout=1.0, but it is at least 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Lora(**wrong)
