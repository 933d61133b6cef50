"""What a round over machines costs beyond its training: this package and a stock Flower app.

    python benchmarks/federation.py                      # 3 MB, 4 rounds, both, in turns
    python benchmarks/federation.py --write 3 17         # megabytes of an upload
    python benchmarks/federation.py 300 --clients 2 --rounds 2    # as much as 24 GiB can hold

4 clients and a server, all processes of this one machine, with TLS and keys on loopback; a Llama of
5 million random weights, 8 texts a client, one step a round. Upload sizes come from the rank of the
adapters: 6,144 numbers of 4 bytes for each rank. The variants:

    fedalt      FedALT over `fedalt server` and `fedalt client`
    in process  the same with `fedalt run`: every message encoded, nothing sent
    flower      FedAvg over PEFT's LoRA as a Flower app with stock SuperNodes, see flower_lora/

Printed are medians over the rounds but the first: seconds of a round, and those beyond the training
of the slowest client (in process: of all clients, who train in one pass); and the most memory of
each kind of process, MiB, ten samples a second. FedALT's broadcast has 8 bytes a number where an
upload has 4; FedAvg's has 4.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import experiment
import psutil
import tomli_w
from document import table, write
from experiment import write_model

VARIANTS = ("fedalt", "in process", "flower")
NUMBERS_A_RANK = 6144
LAST_LINES = 40  # of a log are shown; a traceback of Flower's has many
HERE = Path(__file__).resolve().parent
FEDALT = [sys.executable, "-m", "fedalt"]
# The process's role by a word of its command line.
ROLES = {
    "flwr-serverapp": "app",
    "flwr-clientapp": "client's app",
    "flower-superlink": "SuperLink",
    "flower-supernode": "SuperNode",
    "flower-superexec": "SuperExec",
    "fedalt.flower.gateway": "gateway",
    "fedalt.flower.fleet_client": "fleet client",
    "fedalt server": "server",
    "fedalt client": "client",
}


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """The most memory of each kind of process below this one, MiB."""
    most: dict[str, float] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    words = " ".join(process.cmdline())
                    role = next((name for word, name in ROLES.items() if word in words), None)
                    if role is not None:
                        held = process.memory_info().rss / 2**20
                        most[role] = max(most.get(role, 0), held)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def settings_of(folder: Path, rank: int, rounds: int) -> dict[str, Any]:
    """The run's settings, without data."""
    return {
        "local_baseline": False,
        "model": {"name": str(folder / "model"), "targets": experiment.SITES, "device": "cpu"},
        "data": {"max_length": 200, "validation": 0.0},
        "method": {"name": "fedalt", "rank": rank, "alpha": experiment.ALPHA},
        "training": {"lr": experiment.LR, "batch_size": 8},
        "rounds": {"rounds": rounds, "select": "last", "test": False},
    }


def run_fedalt(folder: Path, rank: int, rounds: int, port: int) -> dict[str, Any]:
    """A server and its clients as processes."""
    federation = folder / "federation"
    file = folder / "settings.toml"
    file.write_text(tomli_w.dumps(settings_of(folder, rank, rounds)))
    names = experiment.clients_of(folder)
    command = [*FEDALT, "federation", "init", str(federation), "--clients", ",".join(names)]
    command += ["--settings", str(file), "--address", f"127.0.0.1:{port}"]
    subprocess.run(command, check=True, capture_output=True)
    for name in names:
        data = federation / "clients" / name / "data"
        shutil.copy(folder / "data" / f"{name}.train.jsonl", data)
    with watched() as most:
        places = [federation / "server" / "federation.toml"]
        places += [federation / "clients" / name / "client.toml" for name in names]
        words = ["server", *["client"] * len(names)]
        running = [
            subprocess.Popen([*FEDALT, word, "--config", str(place)], stdout=subprocess.DEVNULL)
            for word, place in zip(words, places, strict=True)
        ]
        if not end_well(running):
            raise SystemExit(f"a process of {federation} failed")
    found = rounds_of(federation / "server" / "state" / "run", slowest=True)
    shutil.rmtree(federation)
    return {**found, "memory": most}


def end_well(processes: Sequence["subprocess.Popen[Any]"]) -> bool:
    """Wait until all have ended, and whether they did well; one that fails ends the others."""
    try:
        while not any(codes := [each.poll() for each in processes]) and None in codes:
            time.sleep(0.1)
    finally:
        for process in processes:
            process.terminate()
        codes = [process.wait() for process in processes]
    return not any(codes)


def run_in_process(folder: Path, rank: int, rounds: int) -> dict[str, Any]:
    """The same in one process."""
    file, out = folder / "whole.toml", folder / "run"
    whole = settings_of(folder, rank, rounds)
    whole["data"]["path"] = str(folder / "data")
    file.write_text(tomli_w.dumps(whole))
    subprocess.run([*FEDALT, "run", str(file), "--out", str(out), "--quiet"], check=True)
    found = rounds_of(out, slowest=False)
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    peak = max(line["peak_memory_bytes"] for line in lines if line["kind"] == "round") / 2**20
    shutil.rmtree(out)
    return {**found, "memory": {"run": peak}}


def rounds_of(run: Path, *, slowest: bool) -> dict[str, Any]:
    """Medians over the rounds but the first."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    seconds: dict[int, float] = {}
    training: dict[int, list[float]] = {}
    upload = 0
    for line in lines:
        if line["kind"] == "round":
            seconds[line["round"]] = line["seconds"]
        if line["kind"] == "train":
            training.setdefault(line["round"], []).append(line["seconds"])
            upload = line["upload_bytes"]
    fold = max if slowest else sum
    beyond = [seconds[each] - fold(training[each]) for each in seconds if each]
    return {
        "upload": upload,
        "round": median(value for each, value in seconds.items() if each),
        "beyond": median(beyond),
    }


def run_flower(folder: Path, rank: int, rounds: int, port: int) -> dict[str, Any]:
    """A SuperLink and SuperNodes with the reference app; as ours, with TLS and keys."""
    from fedalt.flower.credentials import make_authority, make_client_key, make_server
    from fedalt.flower.processes import QUIET, free_port

    place, clients = folder / "flower", len(experiment.clients_of(folder))
    place.mkdir()
    make_authority(place, "benchmark")
    make_server(place, place, ["localhost", "127.0.0.1"])
    home = {"FLWR_HOME": str(place), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment = {**os.environ, **QUIET, **home}
    about = {"address": f"127.0.0.1:{port}", "root-certificates": str(place / "ca.crt")}
    (place / "config.toml").write_text(tomli_w.dumps({"superlink": {"here": about}}))
    tls = ["--ssl-ca-certfile", str(place / "ca.crt"), "--ssl-certfile", str(place / "server.crt")]
    tls += ["--ssl-keyfile", str(place / "server.key")]
    running: dict[Path, subprocess.Popen[bytes]] = {}  # by their logs

    def start(name: str, *words: str) -> None:
        with (file := place / f"{name}.log").open("wb") as log:
            running[file] = subprocess.Popen(
                words, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def flwr(*words: str) -> None:
        done = subprocess.run(["flwr", *words], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"flwr {words[0]}: {done.stdout}{done.stderr}")

    with watched() as most:
        try:
            link = ["--host", "127.0.0.1", "--port", str(port), "--database", str(place / "db")]
            link += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
            start("SuperLink", "flower-superlink", *tls, *link)
            time.sleep(10)
            for at in range(clients):
                make_client_key(place / f"{at}.key", place / f"{at}.pub")
                flwr("supernode", "register", str(place / f"{at}.pub"), "here")
                node = ["--root-certificates", str(place / "ca.crt"), "--superlink"]
                node += [about["address"], "--auth-supernode-private-key", str(place / f"{at}.key")]
                node += ["--host", "127.0.0.1", "--port", str(free_port()), *tls]
                node += ["--node-config", f"partition-id={at}"]
                start(f"SuperNode {at}", "flower-supernode", *node)
            given = {"folder": str(folder), "benchmarks": str(HERE)}
            counts = {"rank": rank, "rounds": rounds, "clients": clients}
            words = [f'{key}="{value}"' for key, value in given.items()]
            words += [f"{key}={value}" for key, value in counts.items()]
            app = ["flwr", "run", str(HERE / "flower_lora"), "here", "--stream"]
            start("app", *app, "--run-config", " ".join(words))
            wait_for_app(running, out := folder / "rounds.json")
        finally:
            for process in reversed(running.values()):
                process.terminate()
            for process in running.values():
                process.wait()
    found = json.loads(out.read_text())[1:]
    out.unlink()
    shutil.rmtree(place)
    return {
        "upload": rank * NUMBERS_A_RANK * 4,
        "round": median(each["seconds"] for each in found),
        "beyond": median(each["seconds"] - each["training"] for each in found),
        "memory": most,
    }


def wait_for_app(running: Mapping[Path, "subprocess.Popen[Any]"], out: Path) -> None:
    """Wait until a process has ended, as the one does that shows the app's log with the app.

    Raises SystemExit, with the last lines of that process, if the app has not written its file.
    """
    while not (ended := [log for log, process in running.items() if process.poll() is not None]):
        time.sleep(0.5)
    if not out.exists():
        log, code = ended[0], running[ended[0]].returncode
        said = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        what = f"Flower's {log.stem} has ended with code {code} and without results:"
        raise SystemExit("\n".join([what, *said]))


def main() -> None:
    """Run the variants of every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("megabytes", nargs="*", type=float, default=[3])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    given = parser.parse_args()
    from fedalt.flower.processes import free_port

    rows: list[dict[str, Any]] = []
    experiment.TEXTS = {"train": 8, "test": 1}
    os.environ["OMP_NUM_THREADS"] = "1"  # more processes than cores, in every variant
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", "5M")
        experiment.write_clients(folder / "data", given.clients, 4096)
        for size in given.megabytes:
            rank = max(1, round(size * 1e6 / 4 / NUMBERS_A_RANK))
            for variant in given.variants:
                if variant == "fedalt":
                    found = run_fedalt(folder, rank, given.rounds, free_port())
                elif variant == "in process":
                    found = run_in_process(folder, rank, given.rounds)
                else:
                    found = run_flower(folder, rank, given.rounds, free_port())
                held = ", ".join(f"{role} {peak:.0f}" for role, peak in found["memory"].items())
                rows.append(
                    {
                        "upload, MB": round(found["upload"] / 1e6, 1),
                        "variant": variant,
                        "seconds a round": round(found["round"], 2),
                        "beyond training": round(found["beyond"], 2),
                        "most memory, MiB": held,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if given.write:
        write("federation", table(rows))


if __name__ == "__main__":
    main()
