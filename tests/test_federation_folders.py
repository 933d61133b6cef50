"""What a federation leaves behind, looked at with every command and from Python."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import call
from federations import CLIENTS, Federation, Stopped, founded
from runs_for_tests import save_model, settings_for

import fedalt
from fedalt.core.codec import decode, encode
from fedalt.core.digests import Digests
from fedalt.federation.accepted import ACCEPTED, Accepted, read_accepted
from fedalt.federation.client_states import (
    BROADCAST,
    CHOSEN,
    broadcast_after,
    keep,
    round_to_serve,
    settle,
)
from fedalt.federation.messages import Answer, Call
from fedalt.flower.client_model import client_at, evaluate, served
from fedalt.flower.config import read_server_config
from fedalt.flower.revocation import revoke_key
from fedalt.methods.contract import Message
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.folder import StoreError
from fedalt.runs.kept import Kept

ROUNDS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Federation:
    made = founded(tmp_path_factory.mktemp("ended"), model, rounds={"rounds": ROUNDS})
    made.go_on()
    return made


def stopped_in(round_: int):
    def spoil(_: str, answer: bytes) -> bytes:
        if decode(Answer, answer).round == round_:
            raise Stopped
        return answer

    return spoil


def with_nan(client: str, rounds: set[int]):
    def spoil(client_id: str, answer: bytes) -> bytes:
        whole = decode(Answer, answer)
        if client_id not in (client, "everyone") and client != "everyone":
            return answer
        if whole.round not in rounds or whole.upload is None:
            return answer
        tree = {name: torch.full_like(each, torch.nan) for name, each in whole.upload.tree.items()}
        return encode(replace(whole, upload=replace(whole.upload, tree=tree)))

    return spoil


def not_begun(made: Federation) -> None:
    made.go_on(stopped_in(0))


def stopped(made: Federation) -> None:
    made.go_on(stopped_in(2))


def refused(made: Federation) -> None:
    made.go_on(with_nan("b", {1}))


def without_an_upload(made: Federation) -> None:
    made.go_on(with_nan("everyone", {0}))


def revoked(made: Federation) -> None:
    made.go_on(stopped_in(1))
    revoke_key(read_server_config(made.root / "server" / "federation.toml").place, "c")
    made.go_on()


def left(made: Federation) -> None:
    made.go_on()
    assert call("leave", made.run, "--client", "b", "--quiet") == 0


STATES = (not_begun, stopped, refused, without_an_upload, revoked, left)


@pytest.mark.parametrize("state", STATES, ids=lambda each: each.__name__)
def test_a_servers_folder_is_reported_watched_and_tracked_however_it_stands(
    tmp_path: Path, model: Path, state, capsys: pytest.CaptureFixture[str]
) -> None:
    made = founded(tmp_path, model, rounds={"rounds": ROUNDS}, scoring={"generate": False})
    state(made)
    capsys.readouterr()
    for words in (
        ("report", made.run),
        ("watch", made.run),
        ("track", made.run, "--report-to", "tensorboard"),
    ):
        assert call(*words) == 0, (words, capsys.readouterr().err)
    shown = capsys.readouterr().out
    page = (made.run / "report.html").read_text(encoding="utf-8")
    assert "which the server of a federation does not know" in page
    assert {"not_begun": "round 1/3", "stopped": "round 3/3"}.get(state.__name__, "") in shown
    if state in (refused, without_an_upload):
        assert "NaN" in page
    if state is revoked:
        assert "c (revoked)" in page
    if state is left:
        assert "b (left)" in page
    if state is not not_begun:
        assert re.search(r"a +\d\.\d{3}", shown)  # a client and its training loss
        run = fedalt.open_run(made.run)
        assert set(run.lines("train")["client"]) <= {"a", "b", "c"}
        assert run.plot_losses("train").to_dict()


def test_the_ended_federations_table_is_the_one_that_python_has(ended: Federation) -> None:
    table = fedalt.open_run(ended.run).table()
    assert list(table.index) == ["a", "b", "c", "mean", "worst client"]
    assert list(table.columns) == ["score", "own", "shared", "local", "base", "gain over local"]


SERVER = {
    "resume": (),
    "evaluate": (),
    "generate": ("--client", "a", "ask"),
    "export": ("--client", "a", "--out", "x"),
    "chat": ("--client", "a"),
    "join": ("--data", "x"),
}
CLIENT = {
    "resume": (),
    "report": (),
    "watch": (),
    "track": ("--report-to", "tensorboard"),
    "join": ("--data", "x"),
    "leave": ("--client", "a"),
}


def one_error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The single sentence that a command ends with, and with 2."""
    capsys.readouterr()
    assert call(*words) == 2, words
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "fault in fedalt" not in said
    assert said.count("\n") == 0
    return said


@pytest.mark.parametrize("command", SERVER)
def test_what_only_a_client_can_is_refused_at_the_server_with_what_does_it(
    ended: Federation, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    said = one_error(capsys, command, ended.run, *SERVER[command])
    assert "`fedalt evaluate`, `generate`, `chat` and `export` take the client's own" in said
    assert "`fedalt server` goes on with the rounds" in said


@pytest.mark.parametrize("command", CLIENT)
def test_what_only_the_server_can_is_refused_at_a_client_with_what_there_is(
    ended: Federation, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for place in ("state", "client.toml", "."):
        said = one_error(capsys, command, ended.client("a") / place, *CLIENT[command])
        assert "`fedalt evaluate`, `generate`, `chat` and `export`" in said


def test_a_folder_around_the_servers_is_told_apart(
    ended: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    for around in (ended.root / "server", ended.root / "server" / "state"):
        for command in ("report", "watch", "resume"):
            assert f"did you mean {ended.run}?" in one_error(capsys, command, around)


def test_python_names_what_it_cannot_do_with_either_folder(ended: Federation) -> None:
    for act in (
        lambda run: run.generate("a", "ask"),
        lambda run: run.export("a", "x"),
    ):
        with pytest.raises(ValueError, match=r"client's own client\.toml"):
            act(fedalt.open_run(ended.run))
    for act in (lambda run: run.table(), lambda run: run.lines(), lambda run: run.plot_losses()):
        with pytest.raises(ValueError, match="`fedalt evaluate`, `generate`"):
            act(fedalt.open_run(ended.client("a") / "state"))


@pytest.mark.parametrize("place", ["client.toml", "", "state"])
def test_a_client_has_its_own_model_without_the_server(
    ended: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    path = ended.client("a") / place
    assert call("generate", path, "ask 3a", "--json") == 0
    answer = json.loads(capsys.readouterr().out)["answer"]
    assert call("export", path, "--out", tmp_path / "model") == 0
    assert "client a" in (tmp_path / "model" / "README.md").read_text()
    run = fedalt.open_run(path)
    assert run.generate("a", "ask 3a") == answer
    assert fedalt.load(run.export("a", tmp_path / "again"), device="cpu") is not None


def test_a_client_scores_itself_as_the_server_has_on_record(
    ended: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("evaluate", ended.client("b"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    table = fedalt.open_run(ended.run).table()
    losses = {
        line["column"]: line["metrics"]["loss"]
        for line in map(json.loads, (ended.run / "rounds.jsonl").read_text().splitlines())
        if line["kind"] == "score" and line["split"] == "test" and line["client"] == "b"
    }
    assert found["method"] == "fedalt"
    assert found["scores"]["clients"]["b"]["scores"]["own"] == table.loc["b", "own"]
    assert found["losses"]["clients"]["b"]["scores"] == pytest.approx(losses, rel=1e-4)


def test_scoring_with_a_base_model_that_is_loaded_loads_no_other(
    ended: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = client_at(ended.client("b"))
    assert config is not None
    asked = served(ended.client("b"), None)
    lines = evaluate(config, "test")
    monkeypatch.setattr("fedalt.runs.setup.load_base", None)
    assert evaluate(config, "test", base=asked.parts.base) == lines


def test_a_clients_model_of_the_best_round_is_kept_without_a_test(
    tmp_path: Path, model: Path
) -> None:
    made = founded(tmp_path, model, rounds={"rounds": ROUNDS, "test": False})
    made.go_on()
    best = json.loads((made.run / "progress.json").read_text())["best"]["own"][0]
    chosen = json.loads((made.client("a") / "state" / "served.json").read_text())
    assert chosen["own"] == best
    assert fedalt.open_run(made.client("a")).generate("a", "ask") is not None


def test_who_did_not_train_in_the_best_round_keeps_its_model_of_it(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = founded(tmp_path, model, rounds={"rounds": 4, "participation": 0.34, "test": False})

    def best() -> int:
        at: int = json.loads((made.run / "progress.json").read_text())["best"]["own"][0]
        return at

    last: dict[str, int] = {}

    def note(client_id: str, answer: bytes) -> bytes:
        if (whole := decode(Answer, answer)).upload is not None:
            last[client_id] = whole.round
        return answer

    made.go_on(note)
    behind = [name for name in CLIENTS if last.get(name, -1) < best()]
    assert behind
    for name in behind:
        chosen = json.loads((made.client(name) / "state" / "served.json").read_text())
        assert chosen["own"] == best()
        assert call("generate", made.client(name), "ask") == 0


def test_of_a_best_round_that_a_client_was_away_from_it_has_no_model(tmp_path: Path) -> None:
    settings, state = settings_for(tmp_path, tmp_path), read_accepted(tmp_path)
    asked = Call("letters", "terms", "a", 3, -1, train=True, message=Message({}), keep={"own": 1})
    keep(state, asked, settings)
    assert round_to_serve(tmp_path, "own", None) == 2
    settle(state, replace(asked, round=4, keep={"own": 2}), ["own"])
    keep(state, replace(asked, round=4, keep={"own": 2}), settings)
    assert round_to_serve(tmp_path, "own", None) == 2
    bye = replace(asked, round=9, keep={"own": 1}, train=False, last=True)
    settle(state, bye, ["own"])
    keep(state, bye, settings)
    assert round_to_serve(tmp_path, "own", None) == 2


def test_killed_as_a_broadcast_takes_another_ones_place_the_folder_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was set back may send something else after a round than it has sent before."""
    settings, state = settings_for(tmp_path, tmp_path), read_accepted(tmp_path)
    asked = Call("letters", "terms", "a", 3, -1, train=True, message=Message({}, {"sent": 1}))
    keep(state, asked, settings)
    other, put = replace(asked, message=Message({}, {"sent": 2})), FileStates.put

    def killed(self: FileStates, key: str, value: object) -> None:
        put(self, key, value)
        raise Stopped

    monkeypatch.setattr(FileStates, "put", killed)
    with pytest.raises(Stopped):
        keep(state, other, settings)
    monkeypatch.undo()
    again = read_accepted(tmp_path)
    again.kept.digests.require_whole()
    keep(again, other, settings)
    assert broadcast_after(tmp_path, 2).facts == {"sent": 2}
    known = read_accepted(tmp_path).kept.digests
    known.require_whole()
    assert known.names(tmp_path / BROADCAST) == ["0002.safetensors"]


def test_a_client_that_has_not_heard_anything_has_no_model(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = founded(tmp_path, model)
    for command, words in (("generate", ["x"]), ("evaluate", []), ("export", ["--out", "y"])):
        said = one_error(capsys, command, made.client("a") / "client.toml", *words)
        assert "`fedalt client` takes part" in said
    said = one_error(capsys, "generate", made.client("a"), "x", "--client", "b")
    assert "is the place of client 'a'" in said


def test_of_a_round_whose_local_state_was_dropped_there_is_no_local_model(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    accepted = Accepted(folder, 9, Kept(Digests(folder, folder / ACCEPTED), 2**31))
    for at in (4, 7, 8, 9):  # the best one of before any training but the last three, and those
        accepted.kept.digests.note(folder / "local" / "clients" / "a" / f"{at:04d}.safetensors", "")
    for at in (2, 7, 8, 9):
        write_private_below(folder / BROADCAST / f"{at:04d}.safetensors")
    write_private_below(folder / CHOSEN, '{"own": 2, "local": 4}')
    accepted.write(9)
    assert round_to_serve(folder, "own", 2) == 2
    assert [round_to_serve(folder, "local", at) for at in (None, 4, 8)] == [4, 4, 8]
    for dropped in (2, 99):
        with pytest.raises(StoreError, match=r"is not kept; the rounds kept are 5, 8, 9, 10"):
            round_to_serve(folder, "local", dropped)


def write_private_below(file: Path, text: str = "") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
