"""What differs between a drilled federation and an undisturbed one in one process."""

from pathlib import Path
from typing import Any

import pytest
from commands import call
from drill_events import CLIENTS
from drill_members import ABOUT, FIRST
from drill_private import PRIVATE
from federations import Federation, founded
from machines import Machines, Wire, assert_close
from malicious import PLAN, Malicious
from runs_for_tests import scores_of

from fedalt.core.codec import read
from fedalt.engine.firewall import Screening
from fedalt.engine.states import server_of
from fedalt.federation.client import Client
from fedalt.federation.client_folder import open_client
from fedalt.federation.server_folder import open_server
from fedalt.flower.config import read_client_config, read_server_config
from fedalt.runs.folder import open_run
from fedalt.runs.quarantine import refusals


def compared(machines: Machines, root: Path, left_out: set[tuple[int, str]]) -> list[str]:
    """What differs once everything has happened to a federation whose client d means harm."""
    config = read_server_config(machines.server / "federation.toml")

    def member(name: str) -> Client:
        place = read_client_config(machines.client(name) / "client.toml").place
        return open_client(config.terms, name, place.data, root / name, device="cpu")

    members = {name: member(name) for name in machines.clients}
    wire = Wire({**members, "d": Malicious(members["d"], flood=False)}, left_out)
    gate = Screening(config.firewall)
    open_server(
        config.terms, root / "server", wire, config.rules, gate, lambda _: None
    ).to_the_end()

    wrong = _differences(machines, {name: root / name for name in members}, root / "server")
    refused = {(e["round"], e["client"]): e["reason"] for e in refusals(machines.run)}
    for round_, (kind, reason) in PLAN.items():
        if kind != "flood" and not refused.pop((round_, "d"), "").startswith(reason):
            wrong.append(f"round {round_}: {kind} of d was not refused as it should be")
    return wrong + [f"{pair} was refused: {reason}" for pair, reason in refused.items()]


def compared_members(machines: Machines, root: Path) -> list[str]:
    """What differs once clients have come and gone, and the server was restored elsewhere."""
    stays = open_run(machines.run).facts()["stays"]
    twin = founded(root, Path(machines.settings.model.name), **ABOUT)
    changes = {
        stay[key] - 1: (command, name)
        for name, stay in stays.items()
        for key, command in (("joins", "add"), ("leaves", "remove"))
        if key in stay
    }
    twin.go_on(changes={at: _change(twin, *about) for at, about in changes.items()})
    names = sorted({*FIRST, *stays})  # whoever has left keeps its own
    return _differences(machines, {name: twin.client(name) / "state" for name in names}, twin.run)


def compared_private(machines: Machines, root: Path) -> list[str]:
    """What differs once a federation of secure sums has been killed in every step."""
    twin = founded(root, Path(machines.settings.model.name), CLIENTS, **PRIVATE)
    twin.go_on()
    states = {name: twin.client(name) / "state" for name in CLIENTS}
    return _differences(machines, states, twin.run)


def _change(twin: Federation, command: str, name: str) -> Any:
    return lambda: call("federation", command, twin.config, name)


def _differences(machines: Machines, clients: dict[str, Path], server: Path) -> list[str]:
    """States of clients and server, uploads that count, and scores, against an undisturbed run's.

    States and scores to a relative 1e-4. A client's state is that of the last round in which it
    counted: whoever is taken out while it trains has a newer one, of which nothing came.
    """
    agreement = read_server_config(machines.server / "federation.toml").terms
    method, init = agreement.settings.method, agreement.init
    wrong = []
    for name, folder in clients.items():
        last = max(round_ for round_, client in _counted(machines.run) if client == name)
        try:
            states = [
                read(method.client_state, place / "clients" / name / f"{last:04d}.safetensors")
                for place in (machines.client(name) / "state", folder)
            ]
            assert_close(*states)
        except (AssertionError, OSError) as error:
            wrong.append(f"the state of {name} differs: {error}")
    end = agreement.settings.rounds.rounds
    try:
        runs = [open_run(folder).states("own", end) for folder in (machines.run, server)]
        assert_close(*(server_of(method, init, states) for states in runs))
    except AssertionError as error:
        wrong.append(f"the server's state differs: {error}")
    pairs = _counted(machines.run) ^ _counted(server)
    wrong += [f"{pair} counts in one of the two only" for pair in sorted(pairs)]
    return wrong + _other_scores(_scores(machines.run), _scores(server))


def _other_scores(drilled: dict[Any, Any], wanted: dict[Any, Any]) -> list[str]:
    one_sided = sorted(drilled.keys() ^ wanted.keys())
    other = [
        key
        for key in sorted(drilled.keys() & wanted.keys())
        if drilled[key] != pytest.approx(wanted[key], rel=1e-4)
    ]
    return [f"{key} is scored in one of the two only" for key in one_sided] + [
        f"the score {key} is {drilled[key]}, not {wanted[key]}" for key in other
    ]


def _counted(run: Path) -> set[tuple[int, str]]:
    return {
        (line["round"], line["client"])
        for line in scores_of(run)
        if line["kind"] == "train" and line["column"] == "own" and "refused" not in line
    }


def _scores(run: Path) -> dict[tuple[str, int, str, str], Any]:
    return {
        (line["split"], line["round"], line["client"], line["column"]): line["metrics"]
        for line in scores_of(run)
        if line["kind"] == "score"
    }
