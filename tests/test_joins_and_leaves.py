"""Clients that join a run late or leave it: who trains when, and what of them stays."""

from pathlib import Path
from typing import Any

import pytest
from runs_for_tests import adapters_of, save_model, scores_of, settings_for, write_clients

from fedalt.core.settings import Stay
from fedalt.engine.members import Members
from fedalt.engine.schedule import Progress
from fedalt.engine.states import server_of
from fedalt.runs.folder import open_run
from fedalt.runs.lifecycle import resume_run, start_run
from fedalt.runs.settings import Settings, SettingsError, read_settings, to_toml
from fedalt.runs.setup import prepare

STAYS = {"b": {"leaves": 2}, "c": {"joins": 1}}
TRAINED = [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (1, "c"), (2, "a"), (2, "c")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def settings(root: Path, model: Path, **sections: Any) -> Settings:
    about = {"rounds": {"rounds": 3}, "local_baseline": {}, "clients": STAYS, **sections}
    del about["local_baseline"]
    return settings_for(model, write_clients(root / "data"), **about)


def test_members_of_each_round_and_the_last_change_can_be_counted_by_hand() -> None:
    members = Members(("a", "b", "c"), {"b": Stay(leaves=2), "c": Stay(joins=1)})
    assert [members.at(round_) for round_ in range(3)] == [["a", "b"], ["a", "b", "c"], ["a", "c"]]
    assert [members.leaving(round_) for round_ in range(3)] == [[], [], ["b"]]
    assert [members.changed(round_) for round_ in range(4)] == [0, 1, 2, 2]
    assert Members(("a",)).changed(9) == 0


def test_a_best_round_of_other_clients_is_none() -> None:
    progress = Progress(3, {"own": (1, 0.5), "local": (2, 0.7)})
    assert progress.since(2).best == {"local": (2, 0.7)}


def test_who_has_joined_trains_and_is_tested_and_who_has_left_is_not_in_the_total(
    tmp_path: Path, model: Path
) -> None:
    prepared = prepare(settings(tmp_path, model))
    assert prepared.parts.init.clients == 2  # those that are there in round 0
    run = start_run(prepared, tmp_path / "run")
    lines = scores_of(tmp_path / "run")
    own = [line for line in lines if line.get("column") == "own"]
    trained = [(line["round"], line["client"]) for line in own if line["kind"] == "train"]
    assert trained == TRAINED
    tested = {line["client"] for line in own if line.get("split") == "test"}
    assert tested == {"a", "c"}
    assert run.progress().best["own"][0] == 2  # rounds before the last change do not compare
    method, states = prepared.parts.settings.method, run.states("own", 3)
    server = server_of(method, prepared.parts.init, states)
    assert (server.clients, server.latest.clients()) == (2, ["a", "c"])


def test_a_run_that_is_killed_as_a_client_leaves_goes_on_to_the_same_bits(
    tmp_path: Path, model: Path
) -> None:
    prepared = prepare(settings(tmp_path, model))
    start_run(prepared, tmp_path / "whole")

    class Killed:
        def on_event(self, event: Any) -> None:
            if (event.what, event.round, event.column) == ("validate", 2, "own"):
                raise KeyboardInterrupt

        def on_record(self, line: Any) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        start_run(prepared, tmp_path / "run", Killed())
    assert open_run(tmp_path / "run").progress().rounds_done == 2
    resume_run(prepared, tmp_path / "run")
    assert adapters_of(tmp_path / "run") == adapters_of(tmp_path / "whole")


def test_settings_with_members_are_read_again_as_they_were_written(
    tmp_path: Path, model: Path
) -> None:
    written = settings(tmp_path, model)
    (tmp_path / "settings.toml").write_text(to_toml(written))
    assert read_settings(tmp_path / "settings.toml") == written
    assert "[clients" not in to_toml(settings(tmp_path, model, clients={}))


@pytest.mark.parametrize(
    ("clients", "said"),
    [
        ({"x": {"joins": 1}}, r"\[clients.x\]: there is no such client, but a, b, c"),
        ({name: {"joins": 1} for name in "abc"}, "nobody takes part in round 1"),
        ({"a": {"joins": 3, "leaves": 2}}, r"\[clients.a\]: joins = 3 and leaves = 2"),
        ({"a": {"join": 3}}, r"\[clients.a\]: unknown key 'join'"),
        ({"a": {"joins": -1}}, r"\[clients.a\]: joins=-1, but it cannot be negative"),
        ({"a": 3}, r"\[clients.a\]: expected a section, got 3"),
    ],
)
def test_members_that_cannot_be_are_refused_in_a_sentence(
    tmp_path: Path, model: Path, clients: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        prepare(settings(tmp_path, model, clients=clients))
