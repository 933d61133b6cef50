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


def test_status_tells_who_was_added_and_removed_and_the_version(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = founded(tmp_path, model, rounds={"rounds": 2, "test": False})
    config = config_of(made)

    def said(*words: object) -> str:
        capsys.readouterr()
        assert call("federation", *words) == 0
        both = capsys.readouterr()
        return both.out + both.err

    assert "send it to d and to nobody else" in said("add", config, "d")
    assert json.loads((made.root / "server" / "members.json").read_text()) == {
        "version": 1,
        "added": ["d"],
        "removed": [],
    }
    assert "its last upload is subtracted" in said("remove", config, "b")
    write_clients(made.client("d") / "data", ["d"])
    made.grow({}, without=["b"])
    shown = said("status", "--config", config)
    assert "members: version 2, after adding d and removing b" in shown
    assert "d: absent, takes part from round 0 on" in shown
    assert "b: left in round 0" in shown


def test_who_cannot_be_added_or_removed_is_told_why_in_a_sentence(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = founded(tmp_path, model)
    config = config_of(made)

    def error(*words: object) -> str:
        capsys.readouterr()
        assert call("federation", *words) == 2
        return capsys.readouterr().err

    assert "client 'a' is in 'letters' already; expected new names" in error("add", config, "a")
    assert "differs from 'a' in case only" in error("add", config, "A")
    assert "expected a name of at most 100 letters" in error("add", config, "../x")
    assert "does not take part in 'letters'; there are a, b, c" in error("remove", config, "x")
    assert call("federation", "remove", config, "a") == 0
    assert "and was removed" in error("add", config, "a")
    assert "does not take part" in error("rotate-key", config, "a")
    assert call("federation", "remove", config, "b") == 0
    assert "is the last one" in error("remove", config, "c")


def test_a_rotated_key_is_the_clients_only_one(tmp_path: Path, model: Path) -> None:
    made = founded(tmp_path, model)
    config = read_server_config(config_of(made))
    before = clients_by_key(config)
    assert call("federation", "rotate-key", config_of(made), "b") == 0
    after = clients_by_key(config)
    assert sorted(after.values()) == ["a", "b", "c"]
    assert {name for key, name in after.items() if key not in before} == {"b"}
    secret = made.client("b") / "client.key"
    require_client_credentials(secret, None)
    assert secret.stat().st_mode & 0o077 == 0
    assert call("federation", "revoke", "--config", config_of(made), "b") == 0
    assert call("federation", "rotate-key", config_of(made), "b") == 0  # and it is back
    assert revoked(config.place) == []


def test_a_server_restored_elsewhere_from_a_backup_of_two_rounds_ago_ends_as_if_undisturbed(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"rounds": {"rounds": ROUNDS}}
    undisturbed = founded(tmp_path / "undisturbed", model, **about)
    undisturbed.go_on()
    made = founded(tmp_path / "made", model, **about)
    made.go_on(stopped_in(2))
    assert call("federation", "backup", config_of(made), tmp_path / "server.tar") == 0
    assert (tmp_path / "server.tar").stat().st_mode & 0o077 == 0
    made.go_on(stopped_in(4))
    shutil.rmtree(made.root / "server")
    made.place = "elsewhere"
    assert call("federation", "restore", tmp_path / "server.tar", made.server) == 0
    capsys.readouterr()

    asked = made.member("a").answer(calls_of(made, "a"))
    assert "`fedalt client --go-back` follows it" in decode(Answer, asked).error
    before = newest_state(made.client("a") / "state", "a", FedALT().client_state)
    made.go_on(go_back=True)
    assert any("goes back from round 4 to 2" in line for line in made.said["a"])
    aside = made.client("a") / "state" / "set-aside" / "clients" / "a" / before[0]
    assert_close(read(FedALT().client_state, aside), before[1])
    for name in CLIENTS:
        ours = newest_state(made.client(name) / "state", name, FedALT().client_state)
        theirs = newest_state(undisturbed.client(name) / "state", name, FedALT().client_state)
        assert ours[0] == theirs[0]
        assert_close(ours[1], theirs[1])
