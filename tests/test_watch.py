"""`fedalt watch` on a real terminal, beside a run that really goes on in another process."""

import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pexpect
import pytest
from commands import call
from report_records import recommit
from runs_for_tests import settings_for

from fedalt.report.live import Reading, follow, live_of
from fedalt.report.live_drawing import sparkline
from fedalt.runs.folder import open_run
from fedalt.runs.lifecycle import start_run
from fedalt.runs.setup import prepare

FEDALT = str(Path(sys.executable).parent / "fedalt")
KEYS = {"q": "q", "Ctrl-C": "\x03"}


@dataclass(frozen=True)
class Slow:
    """A watcher who takes a moment at every event, so that there is something to see."""

    seconds: float

    def on_event(self, event):
        time.sleep(self.seconds)

    def on_record(self, line):
        pass


def going_run(folder, settings, seconds):
    """A run in another process, begun already."""
    prepared = prepare(settings)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=start_run, args=(prepared, folder, Slow(seconds)))
    process.start()
    while not (folder / "progress.json").exists():
        assert process.is_alive()
        time.sleep(0.02)
    return process


def watch(*words, rows=40):
    """The command on a terminal of its own."""
    return pexpect.spawn(
        FEDALT,
        ["watch", *map(str, words)],
        dimensions=(rows, 120),
        encoding="utf-8",
        # Tests that a shell runs in the background hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture(scope="module")
def long_run(tiny_model_dir, clients_dir, tmp_path_factory):
    """A run that goes on for longer than the tests."""
    run = tmp_path_factory.mktemp("long") / "run"
    settings = settings_for(tiny_model_dir, clients_dir, rounds={"rounds": 500})
    process = going_run(run, settings, 0.01)
    yield run
    process.kill()
    process.join()


def test_the_round_rises_and_the_watch_ends_with_the_run(tiny_model_dir, clients_dir, tmp_path):
    run = tmp_path / "run"
    settings = settings_for(tiny_model_dir, clients_dir, rounds={"rounds": 4})
    process = going_run(run, settings, 0.05)
    screen = watch(run)
    screen.expect(pexpect.EOF)
    screen.wait()
    process.join()
    assert (process.exitcode, screen.exitstatus) == (0, 0)
    rounds = [int(number) for number in re.findall(r"(\d) of 4 rounds done", screen.before)]
    assert rounds == sorted(rounds)
    assert len(set(rounds)) >= 3
    assert rounds[-1] == 4
    assert re.search(r"\d s a round, \d s left", screen.before)
    assert re.search(r"worst client +\S+", screen.before.split("finished")[-1])


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_ends_the_watch_and_not_the_run(long_run, key):
    screen = watch(long_run)
    screen.expect("q ends")
    screen.send("x")  # a key that means nothing
    screen.expect(r"of 500 rounds done")
    screen.send(key)
    screen.expect(pexpect.EOF)
    screen.wait()
    assert screen.exitstatus == 0
    assert "\x1b[?1049l" in screen.before  # the screen of before is back
    done = open_run(long_run).rounds_done()
    deadline = time.monotonic() + 20
    while open_run(long_run).rounds_done() == done and time.monotonic() < deadline:
        time.sleep(0.05)
    assert open_run(long_run).rounds_done() > done


def test_one_frame_of_a_run_that_goes_on_takes_no_lock_and_changes_nothing(long_run):
    before = (long_run / "run.json").stat().st_mtime_ns
    told = subprocess.run(
        [FEDALT, "watch", str(long_run)], capture_output=True, text=True, check=True
    )
    assert re.search(r"\d+ of 500 rounds done", told.stdout)
    for client in "abc":
        assert re.search(rf"{client} +\d\.\d+ +\d\.\d+ +[▁-█]+ +2\.9 kB", told.stdout)
    assert (long_run / "run.json").stat().st_mtime_ns == before


def test_the_watch_does_without_the_heavy_libraries(finished_run):
    check = (
        f"import sys; sys.argv = ['fedalt', 'watch', '--once', {str(finished_run)!r}]\n"
        "from fedalt.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "2 of 2 rounds done" in done.stdout


def test_what_a_record_says_is_read_once_and_what_does_not_count_may_change(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    record = run / "rounds.jsonl"
    whole = record.read_bytes()
    lines = whole.splitlines(keepends=True)
    first = b"".join(lines[: 1 + next(n for n, e in enumerate(lines) if b'"round",' in e)])

    def stand(rounds_done: int, counted: bytes, ahead: bytes) -> None:
        record.write_bytes(counted)
        recommit(run, rounds_done=rounds_done, tested=False)
        record.write_bytes(counted + ahead)

    stand(0, b"", lines[0] + lines[1][:20])
    begun = follow(Reading(run))
    assert (len(begun.counted), begun.ahead) == (0, (json.loads(lines[0]),))
    assert follow(begun) is begun
    stand(1, first, lines[0] + b"\0\0\0\n")
    one = follow(begun)
    assert one.offset == len(first)
    assert b"".join(json.dumps(line).encode() + b"\n" for line in one.counted) == first
    assert one.ahead == (json.loads(lines[0]),)
    assert live_of(one).trained == 1
    # What counts is not read again: spoiled bytes before the offset are not seen.
    stand(2, whole, b"")
    record.write_bytes(b"#" * len(first) + whole[len(first) :])
    two = follow(one)
    assert [json.loads(line) for line in lines] == list(two.counted)
    stand(0, b"", b"")  # another run in the same place
    assert follow(two).lines == ()


def test_a_record_damaged_where_it_counts_is_one_clear_error(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    data = (run / "rounds.jsonl").read_bytes()
    (run / "rounds.jsonl").write_bytes(b"#" + data[1:])
    assert call("watch", run) == 2
    assert "rounds.jsonl is damaged" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_for_a_moment_does_not_end_the_watch(long_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.json", "settings.toml", "progress.json", "rounds.jsonl"):
        shutil.copy(long_run / name, run / name)
    screen = watch(run)
    screen.expect("of 500 rounds done")
    (run / "rounds.jsonl").rename(run / "away")
    (run / "rounds.jsonl").mkdir()
    screen.expect("Is a directory; trying again")
    (run / "rounds.jsonl").rmdir()
    (run / "away").rename(run / "rounds.jsonl")
    screen.expect(r"\x1b\[2mq ends")
    screen.send("q")
    screen.expect(pexpect.EOF)
    screen.wait()
    assert screen.exitstatus == 0


def test_a_comparison_has_a_line_for_each_run_and_ends_with_its_results(
    finished_run, long_run, tmp_path, capsys
):
    out = tmp_path / "out"
    shutil.copytree(finished_run, out / "fedalt" / "seed-0")
    (out / "local" / "seed-0").mkdir(parents=True)
    for name in ("run.json", "settings.toml", "progress.json", "rounds.jsonl"):
        shutil.copy(long_run / name, out / "local" / "seed-0" / name)
    assert call("watch", out) == 0
    said = capsys.readouterr().out
    assert "2 runs begun, 1 finished" in " ".join(said.split())  # the folder's path may be long
    assert re.search(r"fedalt/seed-0 +2/2 .* finished", said)
    assert re.search(r"local/seed-0 +\d+/500 .* (s|min|h) ", said)
    shutil.rmtree(out / "local")
    screen = watch(out)
    screen.expect("q ends")  # all runs are finished, but nobody has drawn the tables yet
    (out / "results.jsonl").write_text("")
    screen.expect(pexpect.EOF)
    screen.wait()
    assert screen.exitstatus == 0


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert call("watch", tmp_path) == 2
    assert f"{tmp_path} is neither a run's folder" in capsys.readouterr().err


def test_more_clients_than_the_screen_has_rows_are_ranked_by_loss(long_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    facts = json.loads((long_run / "run.json").read_text())
    facts |= {"clients": {f"c{n:02}": {} for n in range(40)}, "warnings": ["so many"]}
    (run / "run.json").write_text(json.dumps(facts))
    shutil.copy(long_run / "settings.toml", run / "settings.toml")
    lines = "".join(
        json.dumps(
            {
                "kind": "train",
                "round": 0,
                "client": f"c{n:02}",
                "column": "own",
                "metrics": {"loss": n / 10},
                "upload_bytes": 10,
            }
        )
        + "\n"
        for n in range(40)
    )
    (run / "rounds.jsonl").write_text(lines)
    screen = watch(run, rows=24)
    screen.expect("more clients, all with lower losses")
    assert "c39" in screen.before
    assert "c00" not in screen.before
    screen.expect("note: so many")
    screen.send("q")
    screen.expect(pexpect.EOF)
    assert "c00" in screen.before  # the frame that stays has no end of the screen
    (run / "rounds.jsonl").write_text("")
    screen = watch(run, rows=24)
    screen.expect("more clients, with lower losses or none yet")
    screen.send("q")
    screen.expect(pexpect.EOF)


def test_a_curve_is_as_wide_as_allowed_and_flat_where_nothing_changes():
    assert sparkline([], 8) == ""
    assert sparkline([2.0, 2.0, 2.0], 8) == "▁▁▁"
    assert sparkline([0.0, 7.0, 3.0], 8) == "▁█▄"
    assert sparkline([0, 0, 7, 7, 1, 1], 3) == "▁█▂"


def test_what_watching_and_tracking_need_loads_no_tensor_library():
    modules = "live live_drawing table sheet page parts trackers trackio tensorboard numbers"
    code = (
        "import sys, importlib\n"
        f"for name in {modules.split()}: importlib.import_module(f'fedalt.report.{{name}}')\n"
        "print({'torch', 'numpy', 'transformers', 'altair'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
