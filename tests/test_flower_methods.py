"""Every method over real processes, with encryption and keys: the numbers of one process."""

from pathlib import Path

import pytest
from machines import assert_as_in_one_process, found
from runs_for_tests import save_model
from test_federation import SETTINGS

from fedalt.methods import METHODS

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
CLIENTS = ("a", "b", "c")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", METHODS)
def test_apart_is_as_in_one_process(tmp_path: Path, model: Path, name: str) -> None:
    method = {"name": name, **SETTINGS.get(name, {})}
    machines = found(tmp_path, model, CLIENTS, rounds={"rounds": 3}, method=method)
    everyone = ("server", *CLIENTS)
    try:
        for each in everyone:
            machines.start(each)
        assert machines.wait_for_end(everyone) == dict.fromkeys(everyone, 0)
    finally:
        machines.kill_all()
    assert_as_in_one_process(machines, tmp_path / "run")
