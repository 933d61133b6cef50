"""Clients that are added to a federation and removed from it while it goes on."""

from pathlib import Path

import pytest
from commands import call
from federations import Federation, founded
from machines import assert_close, newest_state
from runs_for_tests import save_model, settings_for, write_clients

from fedalt.runs.lifecycle import start_run
from fedalt.runs.setup import prepare

ROUNDS = 5
STAYS = {"b": {"leaves": 3}, "d": {"joins": 2}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def config_of(made: Federation) -> Path:
    return made.root / "server" / "federation.toml"


@pytest.mark.parametrize("method", ["fedalt", "fedit", "fedlease", "fedalt_select"])
def test_who_is_added_and_removed_while_it_runs_is_so_as_in_a_run_with_the_same_members(
    tmp_path: Path, model: Path, method: str
) -> None:
    about = {"rounds": {"rounds": ROUNDS}, "method": {"name": method}}
    made = founded(tmp_path, model, **about)
    terms = (made.root / "server" / "terms.toml").read_bytes()

    made.grow(
        {
            1: lambda: call("federation", "add", config_of(made), "d"),
            2: lambda: call("federation", "remove", config_of(made), "b"),
        }
    )
    assert (made.root / "server" / "terms.toml").read_bytes() == terms
    data = write_clients(tmp_path / "all", ("a", "b", "c", "d"))
    settings = settings_for(model, data, **about, clients=STAYS)
    start_run(prepare(settings), tmp_path / "run")
    for name in ("a", "c", "d"):
        mine = newest_state(made.client(name) / "state", name, settings.method.client_state)
        theirs = newest_state(tmp_path / "run", name, settings.method.client_state)
        assert mine[0] == theirs[0]
        assert_close(mine[1], theirs[1])
