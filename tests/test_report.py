"""A report's page has the record's numbers, leaves out what is not there, and escapes all texts."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import call
from report_records import SITES, append_lines, example_line, large_record, mixer_line, recommit
from report_records import write_examples as examples_into
from runs_for_tests import write_clients

from fedalt.report.cells import collect
from fedalt.report.compared_figures import gain_map, method_bars, ranked
from fedalt.report.compared_page import comparison_page, read_results
from fedalt.report.comparison import write_results
from fedalt.report.costs import cost_of
from fedalt.report.page import _vega, render
from fedalt.report.records import loss_rows, mixer_record, read_record, site_parts
from fedalt.report.run_page import about, run_page
from fedalt.report.similarity import similarity
from fedalt.report.table import cells_of, joined, run_table
from fedalt.runs.compare import Entry, jobs_of
from fedalt.runs.folder import open_run
from fedalt.runs.record import StoreError
from fedalt.runs.settings import read_settings

STRANGE = "<script>alert(1)</script>&\"'"


class Tables(HTMLParser):
    """Collects the texts of every table by its caption, and the names of all tags and ids."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.ids, self.tags = {}, set(), []
        self.figures = set()
        self._caption, self._open = "", ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        self.ids.add(given.get("id"))
        self.figures.add(given.get("data-figure"))
        match tag:
            case "caption":
                self._open, self._caption = tag, ""
            case "tr":
                self.rows.setdefault(self._caption, []).append([])
            case "th" | "td":
                self._open = "cell"
                self.rows[self._caption][-1].append("")

    def handle_endtag(self, tag):
        if tag in ("caption", "th", "td"):
            self._open = ""

    def handle_data(self, data):
        match self._open:
            case "caption":
                self._caption += data
            case "cell":
                self.rows[self._caption][-1][-1] += data.strip()


def data_of(page):
    """The figures' data as the page holds them."""
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    return json.loads(text)


@pytest.fixture
def run(finished_run, tmp_path):
    """A finished run of two rounds, to be changed."""
    return shutil.copytree(finished_run, tmp_path / "run")


def without(run, *kinds):
    """Take lines of these kinds and the examples out of a run's record, as in an older one."""
    lines = [line for line in open_run(run).lines() if line["kind"] not in kinds]
    (run / "rounds.jsonl").write_text("")
    (run / "examples.jsonl").unlink(missing_ok=True)
    append_lines(run, lines)


def page_of(run):
    return render(run_page(read_record(run)))


def test_the_tables_have_the_numbers_that_the_command_prints(run):
    tables = Tables(page_of(run)).rows
    lines = open_run(run).lines()
    for caption, losses in (("Scores on test data", False), ("Mean loss of an answer", True)):
        table = run_table(lines, losses=losses)
        (found,) = (rows for name, rows in tables.items() if name.startswith(caption))
        columns = ["own", "shared", "local", "base"]
        assert found[0] == ["client", "score", *columns, "gain over local"]
        rows = (*table.clients, table.mean, table.worst)
        assert found[1:] == [[row.name, row.metric, *cells_of(table, row)] for row in rows]


def test_the_command_writes_one_file_and_every_figure(run, tmp_path, capsys):
    figures = tmp_path / "figures"
    assert call("report", run, "--figures", figures, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["report"] == str(run / "report.html")
    page = Tables((run / "report.html").read_text())
    names = page.figures - {None}
    assert {"train-loss", "validation-loss", "similarity", "similarity-tree"} <= names
    assert {path.name for path in figures.iterdir()} == {
        f"{name}.{form}" for name in names for form in ("svg", "png")
    }
    assert (figures / "similarity.svg").read_text().startswith("<svg")
    assert (figures / "similarity.png").read_bytes().startswith(b"\x89PNG")


def test_every_figure_keeps_to_the_schema_of_its_charts(run):
    figures = list(run_page(read_record(run)).figures())
    assert len(figures) > 5
    for figure in figures:
        assert figure.chart.to_dict(validate=True)["$schema"]


def test_what_draws_is_bundled_once_and_a_damaged_copy_is_replaced(tmp_path, monkeypatch):
    import vl_convert

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundled = []
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda: bundled.append(1) or "a\r\nb é")
    assert [_vega() for _ in range(3)] == ["a\r\nb é"] * 3
    (file,) = (tmp_path / "fedalt").glob("vega-*.js")
    assert bundled == [1]
    for damaged in (b"", b"\xff", file.read_bytes()[:-1], file.read_bytes().replace(b"a", b"x")):
        file.write_bytes(damaged)
        assert _vega() == "a\r\nb é"
    assert bundled == [1] * 5
    shutil.rmtree(tmp_path / "fedalt")
    (tmp_path / "fedalt").write_text("in the way")
    assert _vega() == "a\r\nb é"


def test_trained_numbers_are_those_of_the_whole_run_or_named_after_the_first_fit(run):
    def told():
        return next(
            text for name, text in about(read_record(run)).parts[0].items if "trained" in name
        )

    record = read_record(run)
    (summary,) = record.of("summary")
    first = record.facts["trainable_numbers"]
    effort = {**summary["effort"], "trainable_numbers": 54321, "least_numbers": 54321}
    append_lines(run, [{**summary, "effort": effort}])
    assert told() == f"own 54,321, local {first['local']:,}"
    append_lines(run, [{**summary, "effort": {**effort, "least_numbers": 1234}}])
    assert told() == f"own 1,234–54,321, local {first['local']:,}"
    without(run, "summary")
    assert told() == f"own {first['own']:,}, local {first['local']:,}"
    assert "trained numbers in the first fit" in page_of(run)


def test_a_page_names_no_other_file(run):
    tags = Tables(page_of(run)).tags
    named = [given[key] for _, given in tags for key in ("src", "href") if key in given]
    assert all(value.startswith(("#", "data:,")) for value in named)
    (policy,) = (given["content"] for _, given in tags if "http-equiv" in given)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy


def test_what_is_not_on_record_is_left_out_and_named(run):
    without(run, "mixer")
    page = page_of(run)
    assert not {"mixer", "examples"} & Tables(page).ids
    assert "The mixer&#39;s weights: none on record" in page
    assert "the run has no examples.jsonl" in page
    append_lines(run, [mixer_line("a", 0, {SITES[0]: 0.25}), mixer_line("a", 1, {SITES[0]: 0.75})])
    examples_into(run, [example_line("a", number) for number in range(3)])
    page = page_of(run)
    assert {"mixer", "examples"} <= Tables(page).ids
    assert "none on record" not in page


def test_a_run_that_has_done_no_round_has_a_page(run):
    (run / "rounds.jsonl").unlink()
    recommit(run, rounds_done=0, best={}, tested=False)
    page = page_of(run)
    assert Tables(page).ids >= {"run", "absent"}
    assert "no client has been scored yet" in page


def test_the_mixers_means_are_those_of_their_lines(run):
    without(run, "mixer")
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    append_lines(
        run,
        [
            mixer_line("a", 0, {q: 0.5, v: 0.5}),
            mixer_line("a", 1, {q: 0.2, v: 0.6}),
            mixer_line("b", 1, {q: 0.4, v: 1.0}),
            mixer_line("a", 1, {q: 0.0, v: 0.0}, split="test"),
        ],
    )
    mixer = mixer_record(read_record(run))
    assert mixer.round == 2  # as people count
    assert {(row["round"], row["layer"]): row["weight"] for row in mixer.layers} == {
        (1, "0"): 0.5,
        (1, "1"): 0.5,
        (2, "0"): 0.3,
        (2, "1"): 0.8,
    }
    last = {row["client"]: row["weight"] for row in mixer.clients if row["round"] == 2}
    assert last == {"a": 0.4, "b": 0.7}
    assert [row["share"] for row in mixer.tokens if row["client"] == "b"].count(0.5) == 2
    assert site_parts("transformer.h.11.attn.c_attn") == ("11", "c_attn")


def test_of_three_slots_the_first_is_weighed_against_all_others(run):
    assert "the individual adapter against rest of world: 1 is individual alone, one half" in (
        page_of(run)
    )
    without(run, "mixer")
    line = mixer_line("a", 1, {"model.layers.0.self_attn.q_proj": 0.2})
    weights = {site: [first, rest, 0.0] for site, (first, rest) in line["weights"].items()}
    append_lines(run, [{**line, "slots": ["one", "two", "three"], "weights": weights}])
    examples_into(run, [example_line("a", 1, slots=["one", "two", "three"])])
    text = page_of(run)
    assert "the one adapter against all others: 1 is one alone." in text
    assert "<span>all others 0</span>" in text


def test_the_worst_and_the_best_examples_are_shown_and_none_twice(run):
    examples_into(
        run,
        [example_line("a", number) for number in range(9)]
        + [example_line("b", number, tokens=[], prediction=None) for number in (1, 2)],
    )
    text = page_of(run).partition('id="examples"')[2]
    a, b = re.split(r"<summary>b</summary>", text.partition("<footer>")[0])
    assert re.findall(r"<h4>(.*?) <span>loss (.*?)</span>", a) == [
        ("worst 1", "8.000"),
        ("worst 2", "7.000"),
        ("worst 3", "6.000"),
        ("best 1", "0.000"),
        ("best 2", "1.000"),
        ("best 3", "2.000"),
    ]
    assert '<i data-w="00">Is </i>' in a
    assert re.findall(r"<h4>(.*?) <span>loss (.*?)</span>", b) == [
        ("worst 1", "2.000"),
        ("best 1", "1.000"),
    ]
    assert "prediction" not in b.partition('id="costs"')[0]


def test_texts_of_strangers_stay_texts(run):
    lines = [{**line, "client": STRANGE} if line.get("client") == "a" else line
             for line in open_run(run).lines()]  # fmt: skip
    facts = json.loads((run / "run.json").read_text())
    facts["clients"][STRANGE] = facts["clients"].pop("a")
    (run / "run.json").write_text(json.dumps(facts))
    without(run, "train", "score", "round", "mixer")
    append_lines(run, lines)
    over = dict.fromkeys(("prompt", "reference", "prediction"), STRANGE)
    tokens = [[STRANGE, 0.5]]
    examples_into(run, [example_line(STRANGE, 1, tokens=tokens, **over)])
    page = page_of(run)
    assert STRANGE in Tables(page).rows["Scores on test data"][1][0]
    assert page.count("<script") == 3  # the data, Vega and our own
    assert "alert(1)</script>" not in page
    names = {name for each in data_of(page)["datasets"].values() for name in each.get("client", ())}
    assert STRANGE in names


def test_a_round_that_was_begun_twice_is_shown_once(run):
    lines = open_run(run).lines()
    half = [line for line in lines if line["round"] == 1 and line["kind"] == "train"]
    with (run / "rounds.jsonl").open("a") as file:  # written by a process that died
        file.writelines(json.dumps({**line, "round": 2}) + "\n" for line in half)
    rows = loss_rows(read_record(run), "train")
    assert len(rows) == len({(row["round"], row["client"], row["column"]) for row in rows}) == 12
    assert {row["round"] for row in rows} == {1, 2}


def test_clients_that_ask_alike_are_alike(run):
    found = similarity(read_record(run))
    assert (found.column, found.signal, found.groups) == ("own", "BA", {})
    assert sorted(found.names) == ["a", "b", "c"]
    assert all(found.cosines[at][at] == 1 for at in range(3))
    assert all(found.cosines[i][j] == found.cosines[j][i] for i in range(3) for j in range(3))


def test_a_page_has_the_similarity_of_the_record_and_asks_no_states(run):
    line = {
        "kind": "summary",
        "round": 1,
        "effort": {},
        "similarity": {
            "column": "own",
            "round": 1,
            "signal": "B",
            "clients": ["a", "b", "c", "d"],
            "distances": [0.5, 0.25, 1.5, 0.75, 1.0, 1.25],
            "groups": {"a": 0, "c": 0, "d": 1},
        },
    }
    shutil.rmtree(run / "clients")
    append_lines(run, [line])
    found = similarity(read_record(run))
    cosines = {
        (first, second): found.cosines[i][j]
        for i, first in enumerate(found.names)
        for j, second in enumerate(found.names)
    }
    a, b, c, d = ("a · group 0", "b", "c · group 0", "d · group 1")
    assert cosines[a, c] == cosines[c, a] == 0.75
    assert [cosines[a, b], cosines[a, d], cosines[b, c], cosines[b, d]] == [0.5, -0.5, 0.25, 0.0]
    assert cosines[c, d] == -0.25
    # a and c meet first, then b: (0.5 + 0.75) / 2, then d: (1.5 + 1.0 + 1.25) / 3.
    assert sorted({row["height"] for row in found.branches}) == [0.25, 0.625, 1.25]
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "left": ["a", "c"]}))
    recommit(run)
    found = similarity(read_record(run))
    assert sorted(found.names) == [b, d]
    assert found.cosines == [[1.0, 0.0], [0.0, 1.0]]


def test_an_older_record_has_no_similarity_and_no_costs_until_the_run_is_resumed(run, capsys):
    whole = open_run(run).lines()
    without(run, "summary")
    page = page_of(run)
    assert "similarity" not in Tables(page).figures
    assert f"`fedalt resume {run}` adds what is missing" in page
    with pytest.raises(StoreError, match="has no summary of the run"):
        cost_of(run)
    assert call("resume", run, "--quiet") == 0
    assert open_run(run).lines() == whole
    assert "similarity" in Tables(page_of(run)).figures
    assert cost_of(run).steps == 6  # two rounds of 12 records, in batches of 4


def test_where_a_method_keeps_no_adapters_the_baselines_are_compared(run_flags, tmp_path):
    run = tmp_path / "fedit"
    assert call("run", *run_flags, "--method", "fedit", "--rounds", 1, "--out", run, "-q") == 0
    assert similarity(read_record(run)).column == "local"
    alone = tmp_path / "alone"
    words = ["--method", "fedit", "--rounds", 1, "--no-yardstick", "--out", alone, "-q"]
    assert call("run", *run_flags, *words) == 0
    assert similarity(read_record(alone)) == "no two clients keep a trained adapter of their own"


def test_a_large_run_makes_a_small_page(run, tmp_path):
    page = page_of(large_record(tmp_path / "large", run))
    assert len(page.encode()) < 5_000_000
    datasets = data_of(page)["datasets"].values()
    assert sum(len(each.get("client", ())) for each in datasets) > 64 * 50


def test_methods_with_other_clients_are_ranked_by_their_own():
    def scored(**clients):
        return [{name: {"accuracy": value} for name, value in clients.items()}]

    table = joined({"x": scored(a=0.5, b=0.75), "local": scored(a=0.25, b=1.0), "y": scored(c=1.0)})
    assert ranked(table) == {"y": 100.0, "x": 62.5, "local": 62.5}
    drawn = gain_map(table, "local").to_dict()
    cells, numbers = (layer["encoding"] for layer in drawn["layer"])
    assert cells["color"]["field"] == numbers["text"]["field"] == "gain"
    assert [tip["field"] for tip in cells["tooltip"]] == ["method", "client", "gain"]
    rows = json.loads(drawn["data"]["values"])
    assert {(row["method"], row["client"]): row["gain"] for row in rows} == {
        ("x", "a"): 25.0,
        ("x", "b"): -25.0,
        ("local", "a"): 0.0,
        ("local", "b"): 0.0,
    }


def test_bars_stand_in_the_order_of_the_mean_scores_and_tell_them():
    table = joined({
        "x": [{"a": {"accuracy": 0.5}}], "y": [{"a": {"accuracy": 0.75}}]
    })  # fmt: skip
    drawn = method_bars(table, {"x": 3.0, "y": 12.3456}, "MB").to_dict()
    assert json.loads(drawn["data"]["values"]) == [
        {"method": "y", "value": 12.35, "score": 75.0},
        {"method": "x", "value": 3.0, "score": 50.0},
    ]
    assert drawn["layer"][0]["encoding"]["y"]["sort"] == ["y", "x"]


def test_a_folder_that_is_neither_is_one_clear_error(tmp_path, capsys):
    assert call("report", tmp_path) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "neither a run's folder (no run.json) nor a comparison's" in said


def test_without_the_extra_the_command_says_how_to_get_it(run, monkeypatch, capsys):
    monkeypatch.setattr("fedalt.report.page.find_spec", lambda name: None)
    assert call("report", run) == 2
    assert "pip install 'fedalt[report]'" in capsys.readouterr().err


def test_the_doctors_findings_are_a_page(tmp_path, tiny_model_dir, capsys):
    data = write_clients(tmp_path / "data", clients=("a", "b"), count=20)
    shutil.copy(data / "b.train.jsonl", data / "a.test.jsonl")
    file = tmp_path / "data.html"
    assert call("data", "check", data, "--model", tiny_model_dir, "--html", file) == 0
    page = file.read_text()
    tables = Tables(page).rows
    (leaks,) = (rows for caption, rows in tables.items() if caption.startswith("Records that"))
    assert leaks[1][:6] == ["a", "0", "0", "0", "20", "b"]
    assert "20 of 20 test records are in the train data of other clients" in page
    assert "<mark>yes" in page


def test_every_command_of_the_document_runs(finished_run, clients_dir, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "reports.md").read_text()
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("fedalt ")]
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clients_dir, "data")
    shutil.copytree(finished_run, "runs/fedalt")
    shutil.copytree(finished_run, "runs/comparison/fedalt/seed-0")
    entries = [Entry("fedalt", read_settings(Path("runs/fedalt/settings.toml")))]
    out = Path("runs/comparison")
    write_results(out, collect(entries, (0,), jobs_of(entries, (0,), out)))
    for words in commands:
        assert call(*words) == 0
    for file in ("runs/fedalt/report.html", "page.html", "runs/comparison/report.html"):
        assert "Learning curves" in Path(file).read_text()
    assert Path("figures/similarity.svg").exists()
    assert "What the loss is on" in Path("data.html").read_text()


def test_curves_of_a_comparison_stand_only_where_its_best_method_was_run_here(
    finished_run, tmp_path
):
    labels = ("one", "two")
    for label in labels:
        shutil.copytree(finished_run, tmp_path / label / "seed-0")
    settings = read_settings(finished_run / "settings.toml")
    entries = [Entry(label, settings) for label in labels]
    write_results(tmp_path, collect(entries, (0,), jobs_of(entries, (0,), tmp_path)))
    assert "Learning curves" in render(comparison_page(tmp_path))
    best, *_ = ranked(read_results(tmp_path).tables()["scores"])
    (tmp_path / best / "seed-0").rename(tmp_path / "elsewhere")
    shutil.copy(tmp_path / "elsewhere" / "settings.toml", tmp_path / best / "seed-0.toml")
    assert "Learning curves" not in render(comparison_page(tmp_path))
