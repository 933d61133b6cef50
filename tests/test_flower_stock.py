"""Flower's own commands in place of `fedalt server` and `fedalt client`: the same numbers."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import tomli_w
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from machines import Machines, assert_as_in_one_process, found, wait_for
from runs_for_tests import save_model

from fedalt.flower.apps import client
from fedalt.flower.message_content import content_of
from fedalt.flower.processes import ProcessGroup, free_port, process_group, wait_for_port
from fedalt.flower.supervisor import APP

CLIENTS = ("a", "b", "c")


def test_what_is_wrong_with_a_clients_data_is_not_told_to_the_server(
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    machines = found(tmp_path, tiny_model_dir, CLIENTS)
    (machines.client("a") / "data" / "a.train.jsonl").write_text('"private"\n')
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    message = Message(content_of(b"call"), dst_node_id=1, message_type=MessageType.TRAIN)
    config = {"config": str(machines.client("a") / "client.toml")}
    with pytest.raises(RuntimeError, match="cannot answer") as told:
        client(message, Context(1, 1, config, RecordDict(), {}))
    assert "private" not in str(told.value)
    assert "private" in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(900)
def test_with_stock_supernodes_the_numbers_are_those_of_one_process(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    machines = found(tmp_path, model, CLIENTS, rounds={"rounds": 2})
    home = tmp_path / "home"
    home.mkdir()
    about = {"address": machines.address, "root-certificates": str(machines.server / "ca.crt")}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"clinics": about}}))
    with process_group({"FLWR_HOME": str(home)}, tmp_path / "processes.json") as processes:
        superlink(machines, processes)
        for each in CLIENTS:
            key = machines.server / "clients" / f"{each}.pub"
            flwr(processes, tmp_path, "supernode", "register", str(key), "clinics")
            supernode(machines, processes, each)
        settings = f'config="{machines.server / "federation.toml"}"'
        flwr(processes, tmp_path, "run", str(APP), "clinics", "--run-config", settings)
        ended = machines.server / "state" / "ended"
        wait_for(lambda: ended.exists() or processes.dead() is not None, "the end", every=0.5)
        assert ended.exists(), f"{processes.dead()} has ended"
    assert_as_in_one_process(machines, tmp_path / "run")


def superlink(machines: Machines, processes: ProcessGroup) -> None:
    host, _, port = machines.address.rpartition(":")
    files = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt"}
    files["--ssl-keyfile"] = "server.key"
    words = [word for flag, file in files.items() for word in (flag, str(machines.server / file))]
    command = ["flower-superlink", "--host", host, "--port", port, *words]
    command += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    process = start(machines, processes, "superlink", command)
    assert wait_for_port(int(port), process, 60)


def supernode(machines: Machines, processes: ProcessGroup, client_id: str) -> None:
    place = machines.client(client_id)
    command = ["flower-supernode", "--superlink", machines.address]
    command += ["--root-certificates", str(place / "ca.crt")]
    command += ["--auth-supernode-private-key", str(place / "client.key")]
    command += ["--port", str(free_port()), "--node-config", f'config="{place / "client.toml"}"']
    start(machines, processes, client_id, command)


def start(
    machines: Machines, processes: ProcessGroup, name: str, command: Sequence[str]
) -> "subprocess.Popen[bytes]":
    return processes.start(name, command, machines.root / f"{name}.out")


def flwr(processes: ProcessGroup, folder: Path, *words: str) -> None:
    environment = processes.environment
    done = subprocess.run(
        ["flwr", *words], env={**environment}, capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
