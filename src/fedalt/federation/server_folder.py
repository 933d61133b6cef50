"""A federation's server in its folder, which belongs to one agreement."""

from pathlib import Path

from fedalt.engine.screening import Screening
from fedalt.federation.agreement import Agreement, facts_of
from fedalt.federation.round_collector import Say
from fedalt.federation.rules import Rules
from fedalt.federation.server import Server
from fedalt.federation.transport import Transport
from fedalt.runs.folder import StoreError, create, open_run, require_settings
from fedalt.runs.settings import to_toml
from fedalt.runs.setup import arms_of


def open_server(
    agreement: Agreement,
    folder: Path,
    transport: Transport,
    rules: Rules,
    screening: Screening,
    say: Say,
    roster: Path | None = None,
) -> Server:
    """The server in its folder, which is made if it is not there. Raises StoreError."""
    arms, settings = arms_of(agreement.settings), to_toml(agreement.settings)
    if not (folder / "run.json").exists():
        create(folder, settings, facts_of(agreement, arms))
    run = open_run(folder)
    server = Server(agreement, arms, run, transport, rules, screening, say, roster)
    if (terms := server.folder.facts().get("terms")) != agreement.digest:
        raise StoreError(
            f"{folder} belongs to other terms than terms.toml (and its template.txt, if it has "
            f"one): its run.json says {terms!r}, but they are {agreement.digest!r}"
        )
    require_settings(folder, settings)
    return server
