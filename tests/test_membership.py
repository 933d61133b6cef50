"""Clients that join a run late, and clients that leave it."""

from pathlib import Path

import pytest
import torch
from commands import call
from federation import simulate, trees_of
from runs_for_tests import adapters_of, save_model, settings_for, write_clients

from fedalt.core import tree as trees
from fedalt.core.tree import select
from fedalt.engine.robust import central_loss
from fedalt.engine.states import server_of
from fedalt.flower.client_model import clients_of
from fedalt.methods.fedalt import FedALT, Server, rest_of_world
from fedalt.methods.fedit import FedIT
from fedalt.methods.lora import Lora
from fedalt.report.table import run_table
from fedalt.runs.answers import load_run_parts, servings_now
from fedalt.runs.folder import StoreError, open_run
from fedalt.runs.lifecycle import reopen, resume_run, serving, start_run
from fedalt.runs.membership import join, leave
from fedalt.runs.setup import prepare
from fedalt.serving.models import open_models

LORA = Lora(rank=2, alpha=4, dropout=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(model, tmp_path):
    settings = settings_for(model, write_clients(tmp_path / "data"), rounds={"rounds": 2})
    return start_run(prepare(settings), tmp_path / "run")


def server_after(run, round_):
    return run.states("own", round_ + 1).get("server", Server)


def test_without_a_client_the_total_is_that_of_the_others_uploads_bit_for_bit():
    method = FedALT(lora=LORA, weighting="examples")
    states, _ = simulate(method, [("a", "b", "c"), ("a", "c"), ("b", "c")])
    server = states["server"]
    others = [(each, server.latest[each]) for each in ("a", "c")]
    alone = method.aggregate(Server(), others)
    without = method.without(server, "b")
    assert trees.equal(without.total, alone.total)
    assert (without.weight, without.clients) == (alone.weight, 2)
    assert without.latest.clients() == ["a", "c"]


def test_the_one_who_stays_with_one_other_receives_that_others_adapter():
    method = FedALT(lora=LORA)
    states, _ = simulate(method, [("a", "b", "c")] * 2)
    without = method.without(states["server"], "c")
    client = states["clients/a"]
    row = rest_of_world(client.individual, client.weight, method.broadcast(without, "a"))
    for name, tensor in states["clients/b"].individual.items():
        expected = row[name._replace(slot="rest_of_world")]
        torch.testing.assert_close(expected, tensor, rtol=0, atol=1e-6)


def test_averages_cannot_be_taken_apart():
    method = FedIT(lora=LORA)
    states, _ = simulate(method, [("a", "b")])
    assert method.without(states["server"], "a") is None


def test_a_client_leaves_a_run_on_disk(run):
    before = server_after(run, 1)
    others = [before.latest[each].tree for each in ("a", "c")]
    leave(run.path, "b")
    after = server_after(run, 1)
    expected = trees.add(*(trees.cast(tree, torch.float64) for tree in others))
    assert trees.equal(after.total, expected)
    assert after.clients == 2
    assert "b" not in after.latest
    assert list((run.path / "clients" / "b").iterdir())  # its own state is its own
    leave(run.path, "b")  # again, as after an interruption
    assert trees.equal(server_after(run, 1).total, expected)


def test_a_run_goes_on_without_a_client_that_left(run):
    leave(run.path, "b")
    run_on(run.path, 3)
    trained = {
        line["client"] for line in run.lines() if line["kind"] == "train" and line["round"] == 2
    }
    assert trained == {"a", "c"}
    assert server_after(run, 2).clients == 2


def test_models_are_those_of_clients_that_have_not_left(run):
    leave(run.path, "b")
    assert clients_of(run.path) == ["a", "c"]
    assert list(open_models(run.path).by_name) == ["base", "a", "c"]
    open_run(run.path).add_facts({"left": ["a", "b", "c"]})
    for ask in (clients_of, open_models):
        with pytest.raises(ValueError, match="all of its clients have left"):
            ask(run.path)


def test_what_a_client_that_left_has_scored_is_in_no_table_of_later_rounds(run):
    assert [row.name for row in run_table(run.lines()).clients] == ["a", "b", "c"]
    leave(run.path, "b")
    of_stayers = [
        line["metrics"]["loss"]
        for line in run.lines()
        if (line["kind"], line.get("split"), line.get("column")) == ("score", "validation", "own")
        and (line["round"], line["client"] != "b") == (run.progress().best["own"][0], True)
    ]
    assert run.progress().best["own"][1] == central_loss(of_stayers)
    assert len(of_stayers) == 2
    run_on(run.path, 3)
    table = run_table(run.lines())
    assert [row.name for row in table.clients] == ["a", "c"]
    assert all(None not in row.scores for row in table.clients)
    assert [row.name for row in run_table(run.lines(), "validation").clients] == ["a", "c"]


def run_on(path, rounds):
    settings = path / "settings.toml"
    settings.write_text(settings.read_text().replace("rounds = 2", f"rounds = {rounds}"))
    resume_run(reopen(path), path)


def test_a_newcomer_gets_the_whole_world_and_trains_its_own_part(run, tmp_path):
    before = adapters_of(run.path)
    lines = join(run.path, write_clients(tmp_path / "new", clients=("d",)), epochs=3)
    assert {(line["client"], line["column"]) for line in lines} == {
        ("d", "own"),
        ("d", "shared"),
        ("d", "local"),
        ("d", "base"),
    }
    after = adapters_of(run.path)
    assert {key: after[key] for key in before} == before  # no one else's model changes
    assert run.facts()["joined"]["d"]["epochs"] == 3
    parts = reopen(run.path).parts
    served = serving(parts, run.path, "d", "own")
    at = run.progress().chosen("own", "best")
    server = server_of(parts.settings.method, parts.init, run.states("own", at + 1))
    for name, tensor in select(served.tree, "rest_of_world").items():
        mean = server.total[name._replace(slot="individual")] / 3  # all three, none of it its own
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-7)
    assert trees_of(served)


def test_what_there_is_to_know_of_newcomers_is_said_as_of_a_runs_clients(model, tmp_path, capsys):
    stays = {"c": {"joins": 1}}  # whose data are not among the newcomers'
    settings = settings_for(
        model, write_clients(tmp_path / "data"), rounds={"rounds": 2}, clients=stays
    )
    run = start_run(prepare(settings), tmp_path / "run").path
    toml, new = run / "settings.toml", write_clients(tmp_path / "new", clients=("d",))
    toml.write_text(toml.read_text().replace("rounds = 2", "rounds = 3"))
    (new / "d.test.jsonl").unlink()
    assert call("join", run, "--data", new, "--epochs", 1) == 0
    said = capsys.readouterr().err
    assert "note: trained but not scored, without test data: d\n" in said
    assert "[rounds] rounds was 2 when the run began, and is 3\n" in said
    assert "only one client" not in said


def test_what_a_newcomer_serves_and_exports_comes_of_its_own_data(model, tmp_path, monkeypatch):
    settings = settings_for(
        model,
        write_clients(tmp_path / "data", clients=("a", "b")),
        method={"name": "fdlora"},  # whose clients look at their data before they serve
        rounds={"rounds": 2},
        clients={"b": {"joins": 1}},  # no newcomer is named here
    )
    run = start_run(prepare(settings), tmp_path / "run")
    write_clients(tmp_path / "new", clients=("d",))
    monkeypatch.chdir(tmp_path)
    join(run.path, Path("new"))
    monkeypatch.chdir("/")
    parts = load_run_parts(run.path)
    _, found = servings_now(parts, run.path, ["a", "d"], lambda act: act())
    for name, each in found.items():
        assert trees.equal(each.tree, serving(parts, run.path, name, "own").tree)


def test_a_newcomers_mixer_is_exported_as_its_mean_over_its_own_examples(run, tmp_path):
    join(run.path, write_clients(tmp_path / "new", clients=("d",)))
    out = tmp_path / "exports"
    assert call("export", run.path, "--all", "--format", "peft", "--out", out) == 0
    assert {folder.name for folder in out.iterdir()} == set("abcd")


@pytest.mark.parametrize("names", [("a",), ("b", "d")])
def test_a_newcomer_has_a_name_of_its_own(run, tmp_path, names):
    with pytest.raises(StoreError, match=r"has a client '[ab]' already"):
        join(run.path, write_clients(tmp_path / "new", clients=names))


def test_joining_and_leaving_on_the_command_line(run, tmp_path, capsys):
    new = write_clients(tmp_path / "new", clients=("d",))
    assert call("join", run.path, "--data", new, "--epochs", 1) == 0
    assert "gain over local" in capsys.readouterr().out
    assert call("generate", run.path, "--client", "d", "ask 1d") == 0
    assert call("leave", run.path, "--client", "a") == 0
    assert open_run(run.path).left() == {"a"}
    assert call("leave", run.path, "--client", "nobody") == 2
    assert "no client 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["fedit", "fedtree_lora"])
def test_leaving_a_method_of_averages_is_refused(model, tmp_path, capsys, method):
    settings = settings_for(
        model,
        write_clients(tmp_path / "data", clients=("a", "b")),
        rounds={"rounds": 1},
        method={"name": method},
    )
    run = start_run(prepare(settings), tmp_path / "run")
    before = adapters_of(run.path)
    assert call("leave", run.path, "--client", "a") == 2
    assert f"{method} averages uploads" in capsys.readouterr().err
    assert adapters_of(run.path) == before
