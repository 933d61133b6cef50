"""The method that docs/adding-a-method.md builds is one: its block passes the contract suite."""

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_contract
import torch
from federation import assert_same_servings, pull, served, simulate

from fedalt.methods.fedit import FedIT
from fedalt.training.orders import Fit

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from size import code_lines  # noqa: E402

TEXT = (ROOT / "docs" / "adding-a-method.md").read_text()
(BLOCK,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
ENTRY, ROW = re.findall(r"^```text\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
CONTRACT = {
    name: test
    for name, test in vars(test_contract).items()
    if name.startswith("test_") and "method" in inspect.signature(test).parameters
}


@pytest.fixture(scope="module")
def module():
    built = ModuleType("fedprox")
    sys.modules[built.__name__] = built  # where a dataclass looks for the types of its fields
    exec(compile(BLOCK, "docs/adding-a-method.md", "exec"), built.__dict__)
    yield built
    del sys.modules[built.__name__]


@pytest.fixture
def method(module):
    (row,) = eval(f"{{{ROW}}}", {"SMALL": test_contract.SMALL, **module.__dict__}).values()
    return row


@pytest.mark.parametrize("name", CONTRACT)
def test_the_method_of_the_document_keeps_the_contract(method, name):
    test = CONTRACT[name]
    if "clients" in inspect.signature(test).parameters:
        for clients in (("a",), ("a", "b")):
            test(method, clients)
    else:
        test(method)


def test_the_document_tells_what_the_method_does(module, method):
    cohorts = [("a", "b", "c"), ("a", "c")]
    penalties = []

    def watch(client_id, number, order):
        if isinstance(order, Fit):
            moved = {name: tensor + 1 for name, tensor in order.tree.items()}
            penalties.append((order.penalty(order.tree), order.penalty(moved)))
        return pull(client_id, number, order)

    states, _ = simulate(method, cohorts, train=watch)
    plain, _ = simulate(FedIT(lora=test_contract.SMALL), cohorts)
    fedit = served(FedIT(lora=test_contract.SMALL), plain, "abc")
    assert_same_servings(fedit, served(method, states, "abc"))  # `pull` knows no penalty
    numbers = sum(tensor.numel() for tensor in states["server"].adapter.values())
    for at_the_start, one_further in penalties:
        assert at_the_start == 0
        torch.testing.assert_close(one_further, torch.tensor(method.mu / 2 * numbers))


def test_the_entry_names_the_class_of_the_block(module):
    assert re.fullmatch(r'"fedprox": Entry\("(\w+)", "(\w+)"\),\n', ENTRY).groups() == (
        module.__name__,
        module.FedProx.__name__,
    )
    assert module.__doc__.startswith("FedProx: ")


def test_forty_lines_of_code_are_enough():
    imports = [line for line in BLOCK.splitlines() if line.startswith(("import ", "from "))]
    assert code_lines(BLOCK) - len(imports) <= 40
    assert "in forty lines of code and its imports" in TEXT
