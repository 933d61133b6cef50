"""Clients that are added to a federation and removed from it; servers restored from a backup."""

import errno
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from commands import call
from federations import CLIENTS, Stopped, Wire, founded
from machines import assert_close, newest_state
from runs_for_tests import save_model, settings_for, write_clients
from test_federation_folders import stopped_in

from fedalt.core.codec import decode, read
from fedalt.core.declared import SettingsError
from fedalt.federation.messages import Answer
from fedalt.flower import apps, revocation, roster_changes
from fedalt.flower.client_keys import clients_by_key
from fedalt.flower.config import read_server_config
from fedalt.flower.credentials import require_client_credentials
from fedalt.flower.revocation import revoked
from fedalt.methods.fedalt import FedALT
from fedalt.runs.folder import StoreError, locked, open_run
from fedalt.runs.lifecycle import start_run
from fedalt.runs.membership import leave
from fedalt.runs.setup import prepare

ROUNDS = 5
STATE = FedALT().client_state


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("method", ["fedalt", "fedit", "fedlease", "fedalt_select"])
def test_who_is_added_and_removed_while_it_runs_is_so_as_in_a_run_with_the_same_members(
    tmp_path: Path, model: Path, method: str
) -> None:
    about = {"rounds": {"rounds": ROUNDS}, "method": {"name": method}}
    made = founded(tmp_path, model, **about)
    terms = (made.config.parent / "terms.toml").read_bytes()
    made.go_on(
        changes={
            1: lambda: call("federation", "add", made.config, "d"),
            2: lambda: call("federation", "remove", made.config, "b"),
        }
    )
    assert (made.config.parent / "terms.toml").read_bytes() == terms
    data = write_clients(tmp_path / "all", ("a", "b", "c", "d"))
    stays = {"b": {"leaves": 3}, "d": {"joins": 2}}
    settings = settings_for(model, data, **about, clients=stays)
    start_run(prepare(settings), tmp_path / "run")
    for name in ("a", "c", "d"):
        mine = newest_state(made.client(name) / "state", name, settings.method.client_state)
        theirs = newest_state(tmp_path / "run", name, settings.method.client_state)
        assert mine[0] == theirs[0]
        assert_close(mine[1], theirs[1])


def test_nobody_leaves_by_hand_while_the_server_runs(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = founded(tmp_path, model, rounds={"rounds": 2, "test": False})
    refused: list[str] = []

    def try_to_leave(_: str, answer: bytes) -> bytes:
        with pytest.raises(StoreError) as error:
            leave(made.run, "a")
        refused.append(str(error.value))
        return answer

    wire = Wire({name: made.member(name) for name in CLIENTS}, try_to_leave)
    monkeypatch.setattr(apps, "GridTransport", lambda *_: wire)
    apps._serve(None, read_server_config(made.config))
    assert set(refused) == {f"another process is using {made.run}"}
    leave(made.run, "a")


def test_status_tells_who_was_added_and_removed_and_the_version(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = founded(tmp_path, model, rounds={"rounds": 2, "test": False})

    def said(*words: object) -> str:
        capsys.readouterr()
        assert call("federation", *words) == 0
        both = capsys.readouterr()
        return both.out + both.err

    assert "send it to d and to nobody else" in said("add", made.config, "d")
    assert json.loads((made.config.parent / "members.json").read_text()) == {
        "version": 1,
        "added": ["d"],
        "removed": [],
    }
    made.go_on(changes={0: lambda: call("federation", "remove", made.config, "b")})
    assert "its last upload is subtracted" in said("remove", made.config, "c")
    shown = said("status", "--config", made.config)
    assert "members: version 3, after adding d and removing b, c" in shown
    assert "d: absent, takes part from round 1 on" in shown
    assert "b: left in round 2" in shown
    assert "c: leaves in the next round" in shown


def test_a_newcomer_of_a_server_that_listens_everywhere_needs_an_address_to_call(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = founded(tmp_path, model)
    text = made.config.read_text()
    made.config.write_text(text.replace("127.0.0.1:8443", "0.0.0.0:8443"))
    assert call("federation", "add", made.config, "d") == 0
    assert f"{made.client('d') / 'client.toml'}: server = '0.0.0.0:8443'" in told_of(capsys)


def told_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to standard error, its lines joined again."""
    return " ".join(capsys.readouterr().err.split())


def test_who_cannot_be_added_or_removed_is_told_why_in_a_sentence(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = founded(tmp_path, model)

    def error(command: str, name: str) -> str:
        capsys.readouterr()
        assert call("federation", command, made.config, name) == 2
        return capsys.readouterr().err

    assert "client 'a' is in 'letters' already; expected new names" in error("add", "a")
    assert "differs from 'a' in case only" in error("add", "A")
    assert "expected a name of at most 100 letters" in error("add", "../x")
    assert "does not take part in 'letters'; there are a, b, c" in error("remove", "x")
    assert call("federation", "remove", made.config, "a") == 0
    assert "and was removed" in error("add", "a")
    assert "does not take part" in error("rotate-key", "a")
    assert call("federation", "remove", made.config, "b") == 0
    assert "is the last one" in error("remove", "c")


def test_a_rotated_key_is_the_clients_only_one(tmp_path: Path, model: Path) -> None:
    made = founded(tmp_path, model)
    config = read_server_config(made.config)
    before = clients_by_key(config)
    assert call("federation", "rotate-key", made.config, "b") == 0
    after = clients_by_key(config)
    assert sorted(after.values()) == ["a", "b", "c"]
    assert {name for key, name in after.items() if key not in before} == {"b"}
    secret = made.client("b") / "client.key"
    require_client_credentials(secret, None)
    assert secret.stat().st_mode & 0o077 == 0
    assert call("federation", "revoke", "--config", made.config, "b") == 0
    assert call("federation", "rotate-key", made.config, "b") == 0  # and it is back
    assert revoked(config.place) == []


@pytest.mark.parametrize("command", ["revoke", "remove"])
def test_what_was_cut_short_is_ended_by_the_same_command(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    made = founded(tmp_path, model, rounds={"rounds": 3, "test": False})
    made.go_on(stopped_in(1))
    words = ("federation", command, "--config", made.config, "b")
    if command == "remove":
        words = ("federation", command, made.config, "b")

    def killed(_: object) -> None:
        raise OSError(errno.EIO, "as if it was killed")

    with monkeypatch.context() as patch:
        patch.setattr(revocation, "record_revoked", killed)
        patch.setattr(roster_changes, "record_revoked", killed)
        assert call(*words) == 2
    assert "revoked" not in open_run(made.run).facts()
    assert call(*words) == 0
    assert open_run(made.run).facts()["revoked"] == ["b"]  # which no round waits for any more


def test_a_server_restored_elsewhere_from_a_backup_of_two_rounds_ago_ends_as_if_undisturbed(
    tmp_path: Path, model: Path
) -> None:
    template = tmp_path / "template.txt"  # whose place the server's settings name
    template.write_text("{instruction} =>")
    about = {"rounds": {"rounds": ROUNDS}, "data": {"template": str(template)}}
    undisturbed = founded(tmp_path / "undisturbed", model, **about)
    undisturbed.go_on()
    made = founded(tmp_path / "made", model, **about)
    made.go_on(stopped_in(2))
    backup = tmp_path / "server.tar"
    assert call("federation", "backup", made.config, backup) == 0
    assert backup.stat().st_mode & 0o077 == 0
    made.go_on(stopped_in(4))
    shutil.rmtree(made.config.parent)
    made.server_name = "elsewhere"
    assert call("federation", "restore", backup, made.config.parent) == 0
    errors = []

    def refused(_: str, answer: bytes) -> bytes:
        errors.append(decode(Answer, answer).error)
        raise Stopped

    before = newest_state(made.client("a") / "state", "a", STATE)
    made.go_on(refused)
    assert "`fedalt client --go-back` follows it" in errors[0]
    assert newest_state(made.client("a") / "state", "a", STATE)[0] == before[0]
    made.go_on(go_back=True)
    assert any("goes back from round 4 to 2" in line for line in made.said["a"])
    aside = made.client("a") / "state" / "set-aside" / "clients" / "a" / before[0]
    assert_close(read(STATE, aside), before[1])
    for name in CLIENTS:
        ours = newest_state(made.client(name) / "state", name, STATE)
        theirs = newest_state(undisturbed.client(name) / "state", name, STATE)
        assert ours[0] == theirs[0]
        assert_close(ours[1], theirs[1])


def test_who_has_not_trained_since_the_backup_goes_back_too(tmp_path: Path, model: Path) -> None:
    made = founded(tmp_path, model, rounds={"rounds": ROUNDS, "participation": 0.34})
    made.go_on(stopped_in(2))
    backup = tmp_path / "server.tar"
    assert call("federation", "backup", made.config, backup) == 0
    made.go_on(stopped_in(4))  # two rounds of one client each
    made.server_name = "elsewhere"
    assert call("federation", "restore", backup, made.config.parent) == 0
    errors: list[str] = []

    def note(_: str, answer: bytes) -> bytes:
        errors.append(decode(Answer, answer).error)
        return answer

    made.go_on(note, go_back=True)
    assert set(errors) == {""}


def test_a_server_that_counts_what_noise_it_has_spent_has_no_backup(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dp_accounting")
    noisy = {"unit": "client", "epsilon": 8.0, "clip": 0.5}
    made = founded(tmp_path, model, rounds={"rounds": 3, "select": "last"}, privacy=noisy)
    file = tmp_path / "server.tar"
    assert call("federation", "backup", made.config, file) == 2
    assert "its ledger would not count the first time" in capsys.readouterr().err
    assert not file.exists()
    with monkeypatch.context() as patch:  # one of before
        patch.setattr("fedalt.flower.backup._require_without_ledger", lambda _: None)
        assert call("federation", "backup", made.config, file) == 0
    assert call("federation", "restore", file, tmp_path / "elsewhere") == 2
    assert "its ledger would not count the first time" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(SettingsError, match="--go-back makes no sense with"):
        made.member("a", go_back=True)


def test_a_server_whose_whole_folder_was_moved_goes_on(tmp_path: Path, model: Path) -> None:
    template = tmp_path / "template.txt"  # whose place the server's settings name
    template.write_text("{instruction} =>")
    about = {"rounds": {"rounds": 2, "test": False}, "data": {"template": str(template)}}
    made = founded(tmp_path, model, **about)
    made.go_on(stopped_in(1))
    shutil.move(made.config.parent, made.root / "elsewhere")
    made.server_name = "elsewhere"
    made.go_on()
    assert json.loads((made.run / "progress.json").read_text())["rounds_done"] == 2
    settings = made.run / "settings.toml"
    assert "elsewhere" in settings.read_text()
    settings.write_text(settings.read_text().replace("lr = 0.01", "lr = 0.02"))
    with pytest.raises(StoreError, match="was changed after it was written"):
        made.go_on()


def test_a_backup_leaves_out_what_is_made_again_wherever_the_state_lies(
    tmp_path: Path, model: Path
) -> None:
    made = founded(tmp_path, model)
    text = made.config.read_text()
    made.config.write_text(text.replace("[server]", '[server]\nfolder = "deep/state"'))
    for name in ("flower/processes.json", "logs/app.log", "run/incoming/0000/a.bin", "kept.txt"):
        file = made.config.parent / "deep" / "state" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    assert call("federation", "backup", made.config, tmp_path / "b.tar") == 0
    with tarfile.open(tmp_path / "b.tar") as tar:
        inside = {Path(name).as_posix() for name in tar.getnames()}
    state = sorted(name for name in inside if name.startswith("deep/state/"))
    assert state == ["deep/state/kept.txt", "deep/state/run"]


def test_a_server_whose_places_are_absolute_is_not_restored_into_the_old_ones_folder(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = founded(tmp_path, model)
    text, state = made.config.read_text(), made.config.parent / "state"
    made.config.write_text(text.replace("[server]", f'[server]\nfolder = "{state}"'))
    file = tmp_path / "server.tar"
    assert call("federation", "backup", made.config, file) == 2
    assert "write a path relative to the file" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # one of before
        patch.setattr("fedalt.flower.backup._require_movable", lambda _: None, raising=False)
        assert call("federation", "backup", made.config, file) == 0
    assert call("federation", "restore", file, tmp_path / "elsewhere") == 2
    assert "write a path relative to the file" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


def test_all_that_a_federation_is_made_of_is_for_its_owner_alone(
    tmp_path: Path, model: Path
) -> None:
    made = founded(tmp_path, model)
    assert call("federation", "add", made.config, "d") == 0
    root = made.config.parent.parent
    data = {*root.glob("clients/*/data/*")}  # which the test has put there
    for path in {root, *root.rglob("*")} - data:
        assert path.stat().st_mode & 0o077 == 0, path


def test_what_is_no_backup_and_what_is_in_the_way_is_told_in_a_sentence(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = founded(tmp_path, model)

    def error(*words: object) -> str:
        capsys.readouterr()
        assert call("federation", *words) == 2
        return capsys.readouterr().err

    rubbish = tmp_path / "rubbish.tar"
    rubbish.write_bytes(b"rubbish")
    assert "rubbish.tar is no backup, or damaged" in error("restore", rubbish, tmp_path / "new")
    assert "missing.tar" in error("restore", tmp_path / "missing.tar", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert "rubbish.tar exists already" in error("backup", made.config, rubbish)
    nowhere = tmp_path / "nowhere" / "b.tar"
    assert f"error: {nowhere}: No such file" in error("backup", made.config, nowhere)
    inside = made.config.parent / "inside.tar"
    assert "expected a place outside of it" in error("backup", made.config, inside)
    with locked(made.run):
        assert "another process is using" in error("backup", made.config, tmp_path / "b.tar")
    assert call("federation", "backup", made.config, tmp_path / "b.tar") == 0
    assert "is not empty" in error("restore", tmp_path / "b.tar", made.config.parent)
    assert call("federation", "restore", tmp_path / "b.tar", tmp_path / "new") == 0  # not begun
    for path in (tmp_path / "new", *(tmp_path / "new").rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
