"""A damaged folder goes on to the same bits, or is refused by the name of what is damaged."""

import json
import os
import shutil
import stat
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import call
from damaged_folders import REFUSED, OfAFederation, OfARun, Whole, damage
from runs_for_tests import adapters_of, scores_of

from fedalt.core.digests import Digests, digest_of
from fedalt.core.reading import FormError, StoreError, parse, read_sealed, sealed
from fedalt.federation.accepted import read_accepted
from fedalt.runs.quarantine import refusals

SEEDS = range(12)


@pytest.fixture(scope="module")
def of_a_run(tmp_path_factory: pytest.TempPathFactory) -> OfARun:
    return OfARun(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def of_a_federation(tmp_path_factory: pytest.TempPathFactory) -> OfAFederation:
    return OfAFederation(tmp_path_factory.mktemp("federation"))


def outcomes(whole: Whole, seeds: range) -> Counter[str]:
    found = [damage(whole, whole.root / "copy", seed) for seed in seeds]
    assert [each for each in found if not each.fine] == []
    return Counter(each.result for each in found)


def test_a_damaged_run_goes_on_as_before_or_is_refused_by_name(of_a_run: OfARun) -> None:
    assert outcomes(of_a_run, SEEDS)[REFUSED]


def test_a_damaged_federation_goes_on_as_before_or_is_refused_by_name(
    of_a_federation: OfAFederation,
) -> None:
    assert outcomes(of_a_federation, SEEDS)[REFUSED]


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_thousand_damaged_folders(of_a_run: OfARun, of_a_federation: OfAFederation) -> None:
    for whole in (of_a_run, of_a_federation):
        assert outcomes(whole, range(500))[REFUSED] > 250


@pytest.fixture
def run(of_a_run: OfARun, tmp_path: Path) -> Path:
    """A run that was stopped in its last round."""
    return Path(shutil.copytree(of_a_run.at, tmp_path / "run"))


def refused(run: Path, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert call(*(words or ("resume", run, "--quiet"))) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    "name",
    [
        "server/0002.safetensors",
        "server/latest/b/0002.safetensors",
        "clients/a/0002.safetensors",
        "moments/a/0/0002.safetensors",
        "local/clients/b/0001.safetensors",
        "rounds.jsonl",
        "progress.json",
        "run.json",
        "settings.toml",
    ],
)
def test_what_counts_is_missed_by_its_name(
    run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    record = (run / "rounds.jsonl").read_bytes()
    (run / name).unlink()
    assert str(run / name) in refused(run, capsys) or name == "run.json"
    if name != "rounds.jsonl":
        assert (run / "rounds.jsonl").read_bytes() == record


def test_an_older_state_in_a_newer_one_s_place_is_noticed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(run / "server" / "0001.safetensors", run / "server" / "0002.safetensors")
    said = refused(run, capsys)
    assert str(run / "server" / "0002.safetensors") in said
    assert "was changed after it was written" in said


def test_what_no_round_has_written_is_never_read(of_a_run: OfARun, run: Path) -> None:
    for name in ("server/0099.safetensors", "clients/a/0003.safetensors", "clients/z"):
        source = run / "clients" / ("b" if name.endswith("z") else "b/0002.safetensors")
        (shutil.copytree if source.is_dir() else shutil.copy)(source, run / name)
    end, _ = of_a_run.go_on(run)
    expected = of_a_run.end
    states = {path: each for path, each in end[0].items() if not path.startswith("clients/z")}
    assert (states, end[1]) == expected


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: [*lines[:3], lines[3][:20]], "its end is missing"),
        (
            lambda lines: [lines[0].replace('"loss": ', '"loss":1'), *lines[1:]],
            "was changed after it was written",
        ),
        (lambda lines: ["x" * len(lines[0]), *lines[1:]], "line 1: it is not JSON"),
        (lambda lines: ["1" * len(lines[0]), *lines[1:]], "line 1: "),
        (lambda lines: [lines[0].replace('"train"', '"trajn"'), *lines[1:]], "line 1: kind: "),
        (lambda lines: [lines[0].replace('"round"', '"rxund"'), *lines[1:]], "lacks 'round'"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "was changed after it was written"),
    ],
)
@pytest.mark.parametrize("command", ["resume", "watch", "report", "evaluate", "track"])
def test_a_changed_record_is_refused_by_every_command(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    change: Callable[[list[str]], list[str]],
    complaint: str,
) -> None:
    os.utime(run / "progress.json", (0, 0))  # long ago: no network is as late as that
    record = run / "rounds.jsonl"
    record.write_text("".join(f"{line}\n" for line in change(record.read_text().splitlines())))
    words = ["--report-to", "tensorboard"] if command == "track" else []
    said = refused(run, capsys, command, run, *words)
    assert str(record) in said
    assert complaint in said


@pytest.mark.parametrize("round_", ["2", "99", '"3"', "null"])
def test_a_progress_that_was_changed_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], round_: str
) -> None:
    file = run / "progress.json"
    file.write_text(file.read_text().replace('"rounds_done": 3', f'"rounds_done": {round_}'))
    assert str(file) in refused(run, capsys)


def test_a_setting_that_states_depend_on_may_not_change_and_a_rate_is_told(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "settings.toml"
    text = file.read_text()
    file.write_text(text.replace("seed = 0", "seed = 1"))
    assert f"{file} was changed: seed was 0" in refused(run, capsys)
    file.write_text(text.replace("lr = 0.01", "lr = 0.02"))
    assert call("resume", run) == 0
    assert f"{file} was changed: [training] lr was 0.01" in capsys.readouterr().err


def test_a_leaving_that_was_cut_short_is_ended_before_anything_else(
    of_a_run: OfARun,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight = Path(shutil.copytree(run, tmp_path / "straight"))
    assert call("leave", straight, "--client", "b") == 0

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedalt.runs.folder.RunFolder.forget_uploads", killed)
        call("leave", run, "--client", "b")
    assert f"`fedalt leave {run} --client b` was cut short" in refused(run, capsys)
    assert call("leave", run, "--client", "b") == 0
    assert adapters_of(run) == adapters_of(straight)
    assert call("resume", run, "--quiet") == 0
    assert call("resume", straight, "--quiet") == 0
    assert adapters_of(run) == adapters_of(straight)
    assert scores_of(run) == scores_of(straight)


def test_a_client_s_folder_knows_its_states(of_a_federation: OfAFederation, tmp_path: Path) -> None:
    state = of_a_federation.at / "clients" / "a" / "state"
    place = Path(shutil.copytree(state, tmp_path / "state"))
    kept = read_accepted(place)
    assert kept.round == 2
    kept.kept.digests.require_whole()
    local = max((place / "local" / "clients" / "a").glob("*.safetensors"))
    local.unlink()
    with pytest.raises(StoreError, match=f"{local} is missing, but {place / 'accepted.json'}"):
        kept.kept.digests.require_there()
    (place / "accepted.json").unlink()
    with pytest.raises(StoreError, match=r"accepted.json is missing, but .*clients is there"):
        read_accepted(place)


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_folders_of_runs_and_federations_are_for_their_owner_alone(
    tmp_path: Path, umask: int, request: pytest.FixtureRequest
) -> None:
    before = os.umask(umask)
    try:
        run, federation = OfARun(tmp_path / "one"), OfAFederation(tmp_path / "two")
    finally:
        os.umask(before)
    server, clients = federation.at / "server", federation.at / "clients"
    for place in (run.at, server / "state", *(clients / each / "state" for each in "ab")):
        for each in [place, *place.rglob("*")]:
            allowed = 0o700 if each.is_dir() else 0o600
            assert stat.S_IMODE(each.stat().st_mode) == allowed, each


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "it is empty"),
        ("{", "it is not JSON"),
        ("[" * 100_000, "nested deeper"),
        ("[]", "expected an object, got []"),
        ('{"a": true}', "a: expected a whole number, got true"),
        ('{"a": 1.5}', "a: expected a whole number, got 1.5"),
        ('{"a": NaN}', "it is not JSON"),
    ],
)
def test_json_is_checked_before_it_is_used(text: str, complaint: str) -> None:
    with pytest.raises(FormError) as caught:
        parse(text, dict[str, int])
    assert complaint in str(caught.value)


def test_a_line_that_is_damaged_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "refused.jsonl"
    line = {"round": 0, "client": "a", "reason": "x", "bytes": 1, "file": None}
    file.write_text(json.dumps(line) + "\n" + json.dumps({**line, "file": 1}) + "\n")
    with pytest.raises(StoreError, match=r"refused.jsonl is damaged: line 2: file: expected"):
        refusals(tmp_path)


def test_what_is_sealed_shows_every_change(tmp_path: Path) -> None:
    data = sealed({"a": 1, "b": [1.5, "x"]})
    file = tmp_path / "progress.json"
    file.write_bytes(data)
    assert read_sealed(file, dict[str, Any]) == {"a": 1, "b": [1.5, "x"]}
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(StoreError, match=r"progress.json"):
            read_sealed(file, dict[str, Any])


def test_a_list_of_digests_is_one_that_sha256sum_checks(tmp_path: Path) -> None:
    names = ["examples.jsonl", "clients/a/0001.safetensors", "clients/a b/x", "clients/n\\\n/y"]
    digests = Digests(tmp_path, tmp_path / "states-0.sha256")
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
        digests.note(file, digest_of(file.read_bytes()))
    data = digests.to_bytes()
    again = Digests.of_bytes(data, tmp_path, digests.says)
    assert list(again.files()) == list(digests.files())
    (tmp_path / "states-0.sha256").write_bytes(data)
    check = ["sha256sum", "--check", "--quiet", "--strict", "states-0.sha256"]
    assert subprocess.run(check, cwd=tmp_path, check=False).returncode == 0
    (tmp_path / names[1]).write_text("another")
    assert subprocess.run(check, cwd=tmp_path, check=False).returncode == 1
    with pytest.raises(StoreError, match=r"0001.safetensors was changed"):
        again.require_whole()
