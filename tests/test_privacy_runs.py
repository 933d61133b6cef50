"""Private runs from end to end, in both engines: the same numbers, the same ledger."""

import json
from dataclasses import replace

import pytest
from federations import Federation, founded
from runs_for_tests import save_model, settings_for, write_clients
from test_federation import CLIENTS, Killed, Wire, assert_close, place, states_of

from fedalt.core.codec import decode
from fedalt.core.declared import SettingsError
from fedalt.core.reading import StoreError
from fedalt.engine.client_work import ClientWork
from fedalt.engine.privacy import PrivacyError
from fedalt.engine.run import Run
from fedalt.federation.call_checks import told_outside
from fedalt.federation.messages import Answer, Call, Cost
from fedalt.federation.privacy import told_by
from fedalt.flower.config import read_server_config, server_from
from fedalt.report.table import describe
from fedalt.runs.budget import LEDGER
from fedalt.runs.folder import open_run
from fedalt.runs.lifecycle import reopen, resume_run, start_run
from fedalt.runs.membership import leave
from fedalt.runs.setup import prepare
from fedalt.training.group import TrainingError

PRIVACY = {
    "client": {"unit": "client", "epsilon": 50.0, "clip": 0.5, "seed": 3},
    "example": {"unit": "example", "epsilon": 50.0, "clip": 0.5, "seed": 3},
    "quantile": {"unit": "client", "epsilon": 50.0, "clip": 0.5, "quantile": 0.5, "seed": 3},
}
ROUNDS = {"rounds": 2, "select": "last", "participation": 0.7}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def rounds_of(folder):
    return [line for line in open_run(folder).lines() if line["kind"] == "round"]


@pytest.mark.parametrize("unit", PRIVACY)
def test_apart_is_as_in_one_process(tmp_path, model, unit):
    sections = {"rounds": ROUNDS, "privacy": PRIVACY[unit], "training": {"local_epochs": 2}}
    there, settings = place(tmp_path, model, **sections)
    wire = Wire(there.members())
    there.host(wire).to_the_end()
    # Nothing that clients are told follows from losses, which have no noise.
    kept = [decode(Call, data).keep for _, data in wire.sent]
    assert any(kept) == (unit == "example")
    start_run(prepare(settings), tmp_path / "run")
    for who in CLIENTS:
        name, mine = states_of(tmp_path / f"state-{who}", who, settings.method.client_state)
        wanted, theirs = states_of(tmp_path / "run", who, settings.method.client_state)
        assert name == wanted
        assert_close(mine, theirs)
    apart, whole = rounds_of(tmp_path / "server"), rounds_of(tmp_path / "run")
    clips = [line.get("clip") for line in whole]
    assert [line.get("clip") for line in apart] == clips
    if unit == "quantile":
        assert clips[0] == 0.5
        assert clips[1] != 0.5
    else:
        assert clips == [None, None]
    spent = [line["epsilon"] for line in whole]
    assert 0 < spent[0] <= spent[1] <= 50.0
    assert spent[1] > 49.5  # the noise was solved for exactly these rounds
    assert apart[-1]["epsilon"] == pytest.approx(spent[1])
    (sentence,) = (each for each in describe(open_run(tmp_path / "run").lines()) if "priv" in each)
    assert sentence.endswith("at delta 1e-05 spent in 2 rounds")


def test_private_rounds_go_on_after_a_kill_and_the_kill_counts(tmp_path, model, monkeypatch):
    data = write_clients(tmp_path / "data")
    schedule = {"rounds": 3, "select": "last", "test": False}
    budget = {**PRIVACY["client"], "epsilon": 8.0}
    settings = settings_for(model, data, rounds=schedule, privacy=budget)
    prepared, folder = prepare(settings), tmp_path / "run"
    plain, seen = Run._train, []

    def killed(self, arm, round_, cohort):
        outcome = plain(self, arm, round_, cohort)
        seen.append(round_)
        if len(seen) == 4:  # two arms a round: both have trained in the second
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(Run, "_train", killed)
    with pytest.raises(KeyboardInterrupt):
        start_run(prepared, folder)
    monkeypatch.setattr(Run, "_train", plain)
    assert json.loads((folder / LEDGER).read_text())["begun"] == 2
    with pytest.raises(PrivacyError, match="those that were cut short count too"):
        resume_run(reopen(folder), folder)
    begun = [line["epsilon"] for line in rounds_of(folder)]
    assert len(begun) == 2  # the first, and the second once more
    assert begun[1] == pytest.approx(8.0, rel=0.01)
    text = (folder / "settings.toml").read_text()
    (folder / "settings.toml").write_text(text.replace("rounds = 3", "rounds = 2"))
    resume_run(reopen(folder), folder)  # what has been trained can be had


def test_the_settings_of_a_private_run_may_not_be_changed(tmp_path, model):
    data = write_clients(tmp_path / "data")
    schedule = {"rounds": 1, "select": "last", "test": False}
    settings = settings_for(model, data, rounds=schedule, privacy=PRIVACY["client"])
    folder = tmp_path / "run"
    start_run(prepare(settings), folder)
    with pytest.raises(StoreError, match="noise that protects the others too"):
        leave(folder, "a")
    text = (folder / "settings.toml").read_text()
    (folder / "settings.toml").write_text(text.replace("clip = 0.5", "clip = 5.0"))
    with pytest.raises(StoreError, match=r"\[privacy\] clip was 0.5 when the run began"):
        reopen(folder)


def test_late_uploads_do_not_weigh_less_where_one_of_them_has_the_noise(tmp_path, model):
    sections = {"rounds": ROUNDS, "privacy": PRIVACY["client"], "method": {"name": "fedit"}}
    there, _ = place(tmp_path, model, **sections)
    with pytest.raises(SettingsError, match="all noise of a round is in one upload"):
        there.host(Wire({}), late="count", staleness=0.5)
    there.host(Wire({}), late="count")
    total, _ = place(tmp_path / "total", model, **{**sections, "method": {"name": "fedalt"}})
    total.host(Wire({}), late="count", staleness=0.5)  # which nothing weighs there


def test_a_private_upload_counts_whatever_the_norms_of_others(tmp_path, model):
    for unit in ("client", "example"):
        there = founded(tmp_path / unit, model, rounds=ROUNDS, privacy=PRIVACY[unit])
        limit = read_server_config(there.config).firewall.norm_limit
        assert limit == (None if unit == "client" else 10.0)
        server_from(read_server_config(there.config), Wire({}))
    there = Federation(tmp_path / "client" / "federation")
    there.config.write_text(there.config.read_text() + "\n[firewall]\nnorm_limit = 10.0\n")
    wanted = r"federation\.toml: \[firewall\] norm_limit makes no sense with .* unit = 'client'"
    with pytest.raises(SettingsError, match=wanted):
        server_from(read_server_config(there.config), Wire({}))


def test_a_federation_that_was_killed_once_ends_without_its_last_private_round(tmp_path, model):
    schedule = {"rounds": 3, "select": "last", "evaluate_every": 1}
    there, _ = place(
        tmp_path, model, rounds=schedule, privacy={**PRIVACY["client"], "epsilon": 8.0}
    )

    def kill(_, answer):
        if decode(Answer, answer).round == 1:
            raise Killed
        return answer

    with pytest.raises(Killed):
        there.host(Wire(there.members(), kill)).to_the_end()
    told = []
    host = replace(there.host(Wire(there.members())), say=told.append)
    host.to_the_end()
    spent = [line.get("epsilon") for line in rounds_of(tmp_path / "server")]
    assert spent[1] == pytest.approx(8.0, rel=0.01)
    assert [line["cohort"] for line in rounds_of(tmp_path / "server")] == [3, 3, 0]
    assert spent[2] is None
    assert any(line.startswith("round 3: nobody trains: the next round would") for line in told)
    lines = open_run(tmp_path / "server").lines()
    assert {line["round"] for line in lines if line.get("split") == "test"} == {2, -1}
    (sentence,) = (each for each in describe(lines) if "priv" in each)
    assert "epsilon 8 at" in sentence


class Patient(Wire):
    """Whoever is waited for without an end fails the test."""

    silent = 0

    def receive(self):
        came = super().receive()
        self.silent += not came
        assert self.silent < 1000, "the server waits on"
        return came


@pytest.mark.parametrize("exhausted", ["a", "abc"])
def test_a_round_ends_without_clients_whose_budget_is_spent(tmp_path, model, exhausted):
    schedule = {"rounds": 2, "select": "last"}
    there, _ = place(tmp_path, model, rounds=schedule, privacy=PRIVACY["example"])
    members = there.members()
    for who in exhausted:  # a round of it was cut short
        members[who].budget.begin((who,))
    there.host(Patient(members), minimum=3).to_the_end()
    lines = open_run(tmp_path / "server").lines()
    own = [line for line in lines if line["kind"] == "train" and line["column"] == "own"]
    trained = {line["client"] for line in own if line["round"] == 1}
    assert trained == set(CLIENTS) - set(exhausted)
    assert any(line.get("split") == "test" for line in lines)


def test_a_round_that_fails_once_it_is_counted_is_not_tried_again(tmp_path, model, monkeypatch):
    """Each try would spend the client's epsilon once more, with no gradient on its way."""
    schedule = {"rounds": 2, "select": "last"}
    there, _ = place(tmp_path, model, rounds=schedule, privacy=PRIVACY["example"])
    members, train = there.members(), ClientWork.train

    def failing(work, group):
        if group == ["a"] and work.round == 0:
            raise TrainingError("out of memory")
        return train(work, group)

    monkeypatch.setattr(ClientWork, "train", failing)
    there.host(Patient(members), minimum=3).to_the_end()
    assert [members[who].budget.begun for who in CLIENTS] == [2, 2, 2]
    lines = open_run(tmp_path / "server").lines()
    own = [line for line in lines if line["kind"] == "train" and line["column"] == "own"]
    assert {line["client"] for line in own if line["round"] == 0} == set(CLIENTS) - {"a"}
    assert {line["client"] for line in own if line["round"] == 1} == set(CLIENTS)


def test_a_clients_ledger_of_an_earlier_time_is_refused(tmp_path, model):
    schedule = {"rounds": 3, "select": "last"}
    there, _ = place(tmp_path, model, rounds=schedule, privacy=PRIVACY["example"])
    ledger, older = tmp_path / "state-a" / LEDGER, []

    def keep(who, answer):
        if who == "a" and decode(Answer, answer).round == 0:
            older.append(ledger.read_bytes())
        if decode(Answer, answer).round == 2:
            raise Killed
        return answer

    with pytest.raises(Killed):
        there.host(Wire(there.members(), keep)).to_the_end()
    ledger.write_bytes(older[0])
    member = there.member("a")
    with pytest.raises(StoreError, match="counts 1 rounds, but 3 have counted"):
        member.budget.begin(("a",))


def test_the_record_says_what_the_client_has_spent_that_has_spent_most(tmp_path, model):
    there, _ = place(tmp_path, model, rounds=ROUNDS, privacy=PRIVACY["example"])
    about = there.terms.name, there.terms.digest, "a", 1, 0, ""
    answer = Answer(*about, costs=(Cost("own", {"loss": 1.0, "epsilon": 2.0}, 1.0),))
    before = [{"kind": "round", "epsilon": 3.0}, {"kind": "train"}, {"kind": "round"}]
    assert told_by(there.terms, [answer], before)["epsilon"] == 3.0
    assert told_by(there.terms, [answer], [])["epsilon"] == 2.0
    assert told_by(there.terms, [replace(answer, costs=())], before) == {}


def test_the_server_hears_why_a_client_will_not_train():
    error = PrivacyError("the next round would spend epsilon 9, but [privacy] allows 8")
    assert told_outside(error, "a", []) == str(error)


def test_a_seed_is_warned_of(tmp_path, model):
    data = write_clients(tmp_path / "data")
    settings = settings_for(model, data, rounds=ROUNDS, privacy=PRIVACY["client"])
    (warning,) = (each for each in prepare(settings).warnings if "[privacy] seed" in each)
    assert warning.startswith("[privacy] seed = 3: whoever knows it can take the noise out")
    secret = replace(settings, privacy=replace(settings.privacy, seed=None))
    assert not any("[privacy] seed" in each for each in prepare(secret).warnings)
