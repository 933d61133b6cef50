"""Tuning by successive halving: stages counted by hand, and real runs of a tiny model."""

import json
import shutil
from dataclasses import replace
from math import inf
from types import SimpleNamespace

import pytest
import tomli_w
from commands import InThisProcess, call
from runs_for_tests import adapters_of, save_model, scores_of, write_clients
from test_compare import BARE, FILE

from fedalt.cli.compare import _tell_plan
from fedalt.cli.jobs import run_jobs
from fedalt.core.settings import Schedule, Stay
from fedalt.engine.robust import central_loss
from fedalt.runs.compare import Entry, jobs_of, read_comparison
from fedalt.runs.folder import open_run
from fedalt.runs.lifecycle import reopen, resume_run
from fedalt.runs.settings import SettingsError, settings_of
from fedalt.runs.steps import with_equal_steps
from fedalt.runs.tune import (
    Stage,
    Trial,
    best_of,
    budget_of,
    halve,
    is_planned,
    needs_all_rounds,
    numbers_in,
    rounds_of,
    stages_of,
    trials_of,
    tuned_table,
    validation_loss,
)


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    """Trials are no processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedalt.runs.compare.subprocess", SimpleNamespace(Popen=InThisProcess))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, a model, and a comparison of two methods."""
    place = tmp_path_factory.mktemp("tuning")
    save_model(place / "model")
    write_clients(place / "data", clients=("a", "b"))
    (place / "methods.toml").write_text(FILE)
    return place


WORDS = ("--lr", "1e-1,1e-2,1e-3,1e-5", "--rounds", 2, "--jobs", 1)


@pytest.fixture(scope="module")
def tuned(place):
    """A search that has ended: four trials of two methods, two of each go on to two rounds."""
    out = place / "tuned"
    assert call("tune", place / "methods.toml", *WORDS, "--out", out, "--quiet") == 0
    return out


def test_half_of_the_trials_go_on_with_twice_the_rounds_and_two_reach_the_end():
    assert stages_of(8, 4) == [Stage(8, 1), Stage(4, 2), Stage(2, 4)]
    assert stages_of(8, 100) == [Stage(8, 25), Stage(4, 50), Stage(2, 100)]
    assert stages_of(7, 10) == [Stage(7, 5), Stage(4, 10)]
    assert stages_of(2, 10) == [Stage(2, 10)]
    assert stages_of(8, 1) == [Stage(8, 1)]
    assert stages_of(8, 4, 1) == [Stage(8, 4)]
    with pytest.raises(SettingsError, match="stages = 4, but 8 trials of 4 rounds have at most 3"):
        stages_of(8, 4, 4)
    # 8 of one round, 4 of one more, 2 of two more.
    assert budget_of(stages_of(8, 4)) == (
        "every method: 8 trials of 1 round, the best 4 of them up to 2 rounds, the best 2 of them "
        "up to 4 rounds; 16 rounds in all"
    )


def trials(*labels):
    return [
        Trial(label, {"lr": at}, Entry(f"{label} lr={at}", None))
        for label in labels
        for at in range(4)
    ]


def test_every_method_keeps_its_own_best_and_a_failed_trial_goes_no_further():
    first = {"x": [4.0, 2.0, 3.0, 1.0], "y": [9.0, inf, inf, inf]}
    second = {("x", 1): 0.5, ("x", 3): 0.75, ("y", 0): 9.5}
    asked = []

    def score(some, rounds):
        asked.append((rounds, [(trial.label, trial.values["lr"]) for trial in some]))
        if rounds == 1:
            return [first[trial.label][trial.values["lr"]] for trial in some]
        return [second[trial.label, trial.values["lr"]] for trial in some]

    both = trials("x", "y")
    losses = halve(both, [Stage(4, 1), Stage(2, 2)], score)
    assert asked[0] == (1, [(label, at) for label in "xy" for at in range(4)])
    assert asked[1] == (2, [("x", 1), ("x", 3), ("y", 0)])
    assert losses == [[4.0], [2.0, 0.5], [3.0], [1.0, 0.75], [9.0, 9.5], [inf], [inf], [inf]]
    # The best of those that have all rounds, whatever a shorter one has had.
    chosen = best_of(both, losses)
    assert {label: trial.values["lr"] for label, trial in chosen.items()} == {"x": 1, "y": 0}
    assert best_of(trials("z"), [[inf]] * 4) == {}
    # Who was left behind is not chosen for the failures of those that went on.
    failed = [[4.0], [2.0, inf], [3.0], [1.0, inf]]
    assert best_of(trials("x", "y"), [*failed, [1.0, 1.0], [1.0], [1.0], [1.0]]).keys() == {"y"}


def test_trials_whose_noise_is_solved_for_their_rounds_have_all_of_them():
    private = {**BARE, "privacy": {"unit": "example", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0}}
    entries = [Entry("x", settings_of(table, "x")) for table in (BARE, private)]
    assert not is_planned(entries[:1])
    assert is_planned(entries)
    assert stages_of(8, 4, whole=True) == [Stage(8, 4)]
    with pytest.raises(SettingsError, match=r"at most 1, as \[privacy\] epsilon"):
        stages_of(8, 4, 2, whole=True)


def test_every_stage_is_decided_by_its_own_losses():
    of_stage = {1: [1.0, 1.1, 1.2, 1.3, 9, 9, 9, 9], 2: [0.9, 0.95, 0.6, 0.5], 4: [0.4, 0.3]}
    tried = [Trial("x", {"lr": at}, Entry(f"x lr={at}", None)) for at in range(8)]

    def score(some, rounds):
        return [of_stage[rounds][at] for at, _ in enumerate(some)]

    losses = halve(tried, stages_of(8, 4), score)
    assert losses[:4] == [[1.0, 0.9], [1.1, 0.95], [1.2, 0.6, 0.4], [1.3, 0.5, 0.3]]
    assert best_of(tried, losses)["x"].values == {"lr": 3}


def test_a_trial_counts_by_the_round_that_its_comparison_tests(tuned):
    run = next(path for path in tuned.glob("*/*") if (path / "run.json").exists())
    by_round = {}
    for line in scores_of(run):
        if line["kind"] == "score" and line["split"] == "validation" and line["column"] == "own":
            by_round.setdefault(line["round"], []).append(line["metrics"]["loss"])
    losses = [central_loss(by_round[at]) for at in sorted(by_round)]
    for length in range(1, len(losses) + 1):
        schedule = Schedule(rounds=length, select="last")
        assert validation_loss(run, schedule, {}) == losses[length - 1]
        assert validation_loss(run, replace(schedule, select="best"), {}) == min(losses[:length])


def test_no_trial_counts_by_a_round_that_had_other_clients(tmp_path):
    """As the run itself tests none from before the last client joined or left."""
    losses = ({"a": 0.5}, {"a": 0.25}, {"a": 0.5, "c": 0.75}, {"a": 0.5, "c": 0.5})
    lines = [
        {"kind": "score", "split": "validation", "column": "own", "round": at, "client": client}
        | {"metrics": {"loss": loss}}
        for at, of_round in enumerate(losses)
        for client, loss in of_round.items()
    ]
    run = SimpleNamespace(lines=lambda: lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedalt.runs.tune.open_run", lambda path: run)
        joins = {"c": Stay(joins=2)}
        assert validation_loss(tmp_path, Schedule(rounds=4), {}) == 0.25
        assert validation_loss(tmp_path, Schedule(rounds=4), joins) == 0.5
        assert validation_loss(tmp_path, Schedule(rounds=2), joins) == 0.25
    staying = Entry("x", settings_of(BARE, "x"))
    joining = Entry("x", settings_of({**BARE, "clients": {"c": {"joins": 2}}}, "x"))
    assert not needs_all_rounds([staying])
    assert needs_all_rounds([staying, joining])


def test_a_first_stage_is_too_short_by_the_rounds_that_its_trials_have(place, capsys):
    """Of two rounds FedDPA has one by equal steps, in which nothing individual is trained."""
    file = place / "short.toml"
    file.write_text(FILE.partition("[[methods]]")[0] + "[[methods]]\nname = 'feddpa'\n")
    entries, _ = read_comparison(file)
    stages = [Stage(4, 2), Stage(2, 4)]
    _tell_plan(entries, stages, equal_steps=False, quiet=False)
    assert "the first stage" not in capsys.readouterr().err
    _tell_plan(entries, stages, equal_steps=True, quiet=False)
    told = capsys.readouterr().err
    assert "feddpa: 2 of the others' 4 rounds" in told
    assert "note: the first stage, feddpa: " in told


def test_what_is_chosen_is_what_is_compared_where_alpha_follows_the_rank(tmp_path):
    file = tmp_path / "methods.toml"
    file.write_text(
        '[data]\npath = "data"\n[rounds]\nselect = "last"\n'
        '[tune]\nrank = [4, 8]\n[[methods]]\nname = "fedalt"\n'
        '[[methods]]\nname = "flexlora"\n'
        "[methods.tune]\nranks = [{ a = 4, b = 8 }, { a = 8, b = 8 }]\nrank = [8]\n"
    )
    entries, _ = read_comparison(file)
    trials = trials_of(entries, {}, None, 0)
    assert [t.entry.settings.method.lora.alpha for t in trials] == [64, 128, 128, 128]
    assert all(trial.entry.settings.rounds.select == "last" for trial in trials)
    assert trials[2].entry.settings.method.ranks == {"a": 4, "b": 8}
    assert not trials[2].at_edge(trials)
    for chosen in trials[:2], trials[2:]:
        again = {"fedalt": trials[0], "flexlora": trials[2], chosen[1].label: chosen[1]}
        file.write_text(tomli_w.dumps(tuned_table(file, again)))
        compared, _ = read_comparison(file)
        of_label = {entry.label: entry.settings.method for entry in compared}
        assert of_label == {label: trial.entry.settings.method for label, trial in again.items()}


def test_combinations_are_drawn_by_the_seed(place):
    file = place / "drawn.toml"
    file.write_text(TUNED)
    entries, _ = read_comparison(file)
    grid = {"lr": [float(n) for n in range(1, 40)]}
    first, again, other = (
        [trial.values for trial in trials_of(entries, grid, 4, seed)] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first[:4] == first[4:8]  # methods with the same grid try the same


def test_methods_with_other_rounds_are_no_fair_search(place):
    file = place / "rounds.toml"
    file.write_text(FILE.replace("lr = 3e-2", "lr = 3e-2\n[methods.rounds]\nrounds = 3"))
    entries, _ = read_comparison(file)
    with pytest.raises(SettingsError, match=r"numbers of rounds \(fedalt 1, FFA.*3\); give --rou"):
        rounds_of(entries)
    assert rounds_of(entries[:1]) == 1


def test_a_trial_has_the_rounds_that_its_method_is_compared_with(place):
    file = place / "steps.toml"
    methods = "[[methods]]\nname = 'fedlora_optimizer'\n[[methods]]\nname = 'feddpa'\n"
    file.write_text(FILE + methods)
    entries, _ = read_comparison(file)

    def rounds(length, equal_steps):
        trials = trials_of(entries, {"lr": [1e-3, 1e-2]}, None, 0, equal_steps=equal_steps)
        return [trial.after(length).settings.rounds.rounds for trial in trials[::2]]

    compared = [with_equal_steps(entry.lasting(10).settings).rounds.rounds for entry in entries]
    assert rounds(10, equal_steps=True) == compared == [10, 10, 9, 5]
    assert rounds(5, equal_steps=True) == [5, 5, 4, 3]
    assert rounds(10, equal_steps=False) == [10, 10, 10, 10]


def test_the_numbers_of_a_search_are_whole_ones(place):
    file = place / "numbers.toml"
    file.write_text("[tune]\nstages = 0\n")
    with pytest.raises(SettingsError, match=r"\[tune\] stages: expected a whole number above 0"):
        numbers_in(file)
    file.write_text("[tune]\nstages = 2\ntrials = 8\n")
    assert numbers_in(file) == (8, 2)


def test_the_better_half_goes_on_and_the_budget_is_the_same(tuned, place):
    lines = [json.loads(line) for line in (tuned / "tune.jsonl").read_text().splitlines()]
    for method in ("fedalt", "FFA-LoRA, faster"):
        of_method = [line for line in lines if line["method"] == method]
        assert sorted(line["rounds"] for line in of_method) == [1, 1, 2, 2]
    runs = {run.parent: open_run(run.parent) for run in tuned.glob("*/*/run.json")}
    assert sum(run.rounds_done() for run in runs.values()) == 2 * 6
    for method in ("fedalt", "ffa-lora-faster"):
        after_one = {
            path: validation_loss(path, Schedule(rounds=1), {})
            for path in runs
            if path.parent.name.startswith(method)
        }
        ranked = sorted(after_one, key=after_one.get)
        assert [runs[path].rounds_done() for path in ranked] == [2, 2, 1, 1]


def test_a_trial_that_went_on_is_what_a_run_of_that_length_is(tuned, place):
    entries, _ = read_comparison(place / "methods.toml")
    all_ = trials_of(entries, {"lr": [1e-1, 1e-2, 1e-3, 1e-5]}, None, 0)
    paths = {job.path: job for job in jobs_of([trial.after(2) for trial in all_], [0], tuned)}
    grown = next(path for path in paths if open_run(path).rounds_done() == 2)
    alone = jobs_of([paths[grown].entry], [0], place / "alone")
    assert run_jobs(alone, 1, quiet=True) == []
    assert adapters_of(alone[0].path) == adapters_of(grown)
    assert scores_of(alone[0].path) == scores_of(grown)
    losses = [
        line["metrics"]["loss"]
        for line in scores_of(grown)
        if line["kind"] == "score" and line["round"] == 0
    ]
    assert validation_loss(grown, Schedule(rounds=1), {}) == central_loss(losses)
    assert (
        validation_loss(grown, Schedule(rounds=2), {}) == open_run(grown).progress().best["own"][1]
    )


def test_a_search_that_was_killed_goes_on_and_repeats_nothing(tuned, place, capsys):
    out = place / "killed"
    shutil.copytree(tuned, out)
    before = adapters_of(out)
    longest = max(out.glob("fedalt*/seed-0"), key=lambda run: open_run(run).rounds_done())
    shutil.rmtree(longest)  # as if it had never begun
    (out / "tune.jsonl").unlink()
    table = (out / "tuned.toml").read_text()
    (out / "tuned.toml").unlink()
    assert call("tune", place / "methods.toml", *WORDS, "--out", out) == 0
    said = capsys.readouterr()
    assert "8 runs, 7 finished" in said.err
    assert "4 runs, 3 finished" in said.err
    assert "every method: 4 trials of 1 round, the best 2 of them up to 2 rounds; 6" in said.err
    assert "loss, 1 round" in said.out
    assert "loss, 2 rounds" in said.out
    assert adapters_of(out) == before
    assert (out / "tuned.toml").read_text() == table
    assert (out / "tune.jsonl").read_text() == (tuned / "tune.jsonl").read_text()


def test_a_trial_that_diverges_is_the_worst_and_the_search_ends(place, capsys):
    out, one = place / "diverged", place / "one.toml"
    one.write_text(FILE.split('[[methods]]\nname = "ffa_lora"')[0])
    assert call("tune", one, "--lr", "1e30,1e-2", "--out", out, "--jobs", 1) == 0
    assert "failed" in capsys.readouterr().out
    entries, _ = read_comparison(out / "tuned.toml")
    assert entries[0].settings.training.lr == 1e-2
    lines = [json.loads(line) for line in (out / "tune.jsonl").read_text().splitlines()]
    assert [line["validation_loss"] is None for line in lines] == [True, False]
    assert call("tune", one, "--lr", "1e30,1e31", "--out", place / "none", "--jobs", 1) == 1
    assert "no trial of fedalt has succeeded" in capsys.readouterr().err


def test_a_run_is_made_longer_and_tested_again(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    before = scores_of(run)
    assert call("resume", run, "--rounds", 1) == 2
    assert "has 2 rounds already; it cannot end after 1" in capsys.readouterr().err
    assert call("resume", run, "--rounds", 3, "--quiet") == 0
    lines = scores_of(run)
    assert lines[: len(before)] == before
    assert open_run(run).rounds_done() == 3
    tested = [line["column"] for line in lines[len(before) :] if line.get("split") == "test"]
    assert set(tested) == {"own", "shared", "local", "base"}
    whole = reopen(run)
    assert resume_run(whole, run).progress().tested
    assert scores_of(run) == lines


def test_tuning_reads_no_test_data_and_writes_a_file_to_compare_with(tuned):
    trials = [json.loads(line) for line in (tuned / "tune.jsonl").read_text().splitlines()]
    assert len(trials) == 8
    for record in tuned.rglob("rounds.jsonl"):
        assert '"test"' not in record.read_text()
    entries, _ = read_comparison(tuned / "tuned.toml")
    for entry in entries:
        of_method = [trial for trial in trials if trial["method"] == entry.label]
        best = min(of_method, key=lambda trial: trial["validation_loss"])
        assert best["rounds"] == 2
        assert entry.settings.training.lr == best["lr"]
    assert jobs_of(entries, (0,), tuned)[0].settings.rounds.test


def test_what_is_best_at_the_edge_is_said(place, capsys):
    out = place / "edge"
    words = ("--lr", "1e-2,1e-5", "--rank", "1,2", "--stages", 1, "--jobs", 1, "--out", out)
    assert call("tune", place / "methods.toml", *words) == 0
    assert "chosen at the edge of what was tried" in capsys.readouterr().err
    entries, _ = read_comparison(out / "tuned.toml")
    assert all(entry.settings.method.lora.rank in (1, 2) for entry in entries)


def test_where_the_last_round_is_tested_all_trials_have_all_rounds(place, capsys):
    file, out = place / "last.toml", place / "last"
    last = FILE.replace("rounds = 1\n", 'rounds = 2\nselect = "last"\n')
    file.write_text(last.partition('[[methods]]\nname = "ffa_lora"')[0])
    words = ("--lr", "1e-2,1e-3,1e-4,1e-5", "--jobs", 1, "--out", out)
    assert call("tune", file, *words) == 0
    assert "every method: 4 trials of 2 rounds; 8 rounds in all" in capsys.readouterr().err
    lines = [json.loads(line) for line in (out / "tune.jsonl").read_text().splitlines()]
    assert [line["rounds"] for line in lines] == [2, 2, 2, 2]
    assert numbers_in(file) == (None, None)
    assert stages_of(4, 2) == [Stage(4, 1), Stage(2, 2)]  # as it would be otherwise


GRID = """
[tune]
alpha = [2.0, 16.0]
trials = 2
"""
TUNED = FILE.replace("[scoring]", f"{GRID}[scoring]") + (
    "[[methods]]\nname = 'pf2lora'\nrank = 2\n"
    "[methods.tune]\ninner_lr = [0.5, 1.0]\nhypergradient = ['first_order']\n"
)


def test_tuning_reaches_every_setting_with_as_many_trials_for_every_method(place):
    file = place / "grid.toml"
    file.write_text(TUNED)
    entries, _ = read_comparison(file)
    trials = trials_of(entries, {"lr": [1e-3]}, numbers_in(file)[0], 0)
    assert [trial.label for trial in trials] == [e.label for e in entries for _ in range(2)]
    pf2lora = [trial for trial in trials if trial.label == "pf2lora"]
    for trial in pf2lora:
        method = trial.entry.settings.method
        assert trial.values["inner_lr"] == method.inner_lr
        assert method.hypergradient == "first_order"
        assert trial.values["alpha"] == method.lora.alpha
        assert trial.entry.settings.training.lr == 1e-3
    assert len({tuple(trial.values.items()) for trial in pf2lora}) == 2
    table = tuned_table(file, {trial.label: trial for trial in trials})
    file.write_text(tomli_w.dumps(table))
    again, _ = read_comparison(file)
    assert again[2].settings.method == pf2lora[1].entry.settings.method
    assert not again[2].tune


def test_methods_never_get_different_numbers_of_trials(place):
    file = place / "grid.toml"
    file.write_text(TUNED.replace("trials = 2", ""))
    entries, _ = read_comparison(file)
    with pytest.raises(SettingsError, match=r"different numbers .*fedalt 2.*pf2lora 4.*trials = 2"):
        trials_of(entries, {}, numbers_in(file)[0], 0)
    with pytest.raises(SettingsError, match=r"trials = 3, but .* fedalt 2"):
        trials_of(entries, {}, 3, 0)
    with pytest.raises(SettingsError, match="nothing to try"):
        trials_of([replace(entry, tune={}) for entry in entries], {}, None, 0)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            "inner_lr =",
            "inner_rate =",
            r"\[tune\] inner_rate: method 'pf2lora' has no such",
        ),
        (
            "alpha =",
            "outer_lr =",
            r"outer_lr: method 'fedalt' has no.* lr, rank, alpha, dropout",
        ),
        ("[0.5, 1.0]", "0.5", r"inner_lr: expected a list of values to try, got 0.5"),
        ("[0.5, 1.0]", "[0.5, -1.0]", "inner_lr.*cannot be negative"),
        ("[2.0, 16.0]", "['big']", r"\[tune\] alpha.*expected a finite number, got 'big'"),
    ],
)
def test_mistakes_in_a_grid_are_one_error_that_names_the_setting(place, old, new, complaint):
    file = place / "wrong.toml"
    file.write_text(TUNED.replace(old, new))
    with pytest.raises(SettingsError, match=complaint):
        read_comparison(file)
