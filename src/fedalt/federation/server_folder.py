"""A federation's server in its folder, which belongs to one agreement."""

import tomllib
from pathlib import Path

from fedalt.core.files import atomic_write
from fedalt.core.reading import read_text
from fedalt.engine.firewall import Screening
from fedalt.federation.agreement import Agreement, facts_of
from fedalt.federation.owner_messages import Say
from fedalt.federation.rules import Rules
from fedalt.federation.secure_keys import Signatures
from fedalt.federation.server import Server
from fedalt.federation.transport import Transport
from fedalt.runs.beginning import create
from fedalt.runs.folder import StoreError, open_run
from fedalt.runs.settings import SettingsError, to_toml


def open_server(
    agreement: Agreement,
    folder: Path,
    transport: Transport,
    rules: Rules,
    screening: Screening,
    say: Say,
    roster: Path | None = None,
    signatures: Signatures | None = None,
) -> Server:
    """The server in its folder, which is made if it is not there. Raises StoreError.

    SettingsError for rules that need to see what is summed securely, or upset a sum's privacy.
    """
    privacy = agreement.settings.privacy
    if privacy.unit == "client" and screening.firewall.norm_limit is not None:
        raise SettingsError(
            "[firewall] norm_limit makes no sense with [privacy] unit = 'client' in the terms: "
            "leave it out; whether an upload counts would follow from those of others, which no "
            "noise hides, and clip bounds every upload already"
        )
    if privacy.secure_sum:
        _require_blind(rules, screening)
    if privacy.quantile is not None and rules.late == "count":
        raise SettingsError(
            "[rules] late = 'count' makes no sense with [privacy] quantile in the terms: leave it "
            "out; the clip of an earlier round may be above what this round's noise hides"
        )
    if rules.staleness and privacy.unit == "client" and agreement.settings.method.averages:
        raise SettingsError(
            f"[rules] staleness = {rules.staleness:g} makes no sense with [privacy] unit = "
            "'client' in the terms: leave it out; all noise of a round is in one upload, and a "
            "late one that counts less would take it along"
        )
    settings = to_toml(agreement.settings)
    if not (folder / "run.json").exists():
        create(folder, settings, facts_of(agreement))
    run = open_run(folder)
    server = Server(agreement, run, transport, rules, screening, say, roster, signatures)
    if (terms := server.folder.facts().get("terms")) != agreement.digest:
        raise StoreError(
            f"{folder} belongs to other terms than terms.toml (and its template.txt, if it has "
            f"one): its run.json says {terms!r}, but they are {agreement.digest!r}"
        )
    _require_settings(folder, settings)
    return server


def _require_settings(path: Path, settings: str) -> None:
    """Raise StoreError unless a run's settings.toml has this text, which nobody may edit.

    But for the place of the template, which is another one where the server's folder was moved.
    """
    file = path / "settings.toml"
    if (written := read_text(file)) == settings:
        return
    if _without_place(written) != _without_place(settings):
        raise StoreError(
            f"{file} was changed after it was written: it is not what the terms say; put it back "
            "from a backup"
        )
    atomic_write(file, settings.encode())


def _without_place(settings: str) -> object:
    """Settings but for the folder of their template, whose content is part of the terms' digest."""
    try:
        table = tomllib.loads(settings)
        table["data"]["template"] = Path(table["data"]["template"]).name
    except (tomllib.TOMLDecodeError, KeyError, TypeError):
        return settings
    return table


def _require_blind(rules: Rules, screening: Screening) -> None:
    """Refuse what an operator decides by single uploads, which a secure sum does not show."""
    why = "makes no sense with [privacy] secure_sum in the terms: leave it out"
    if rules.late == "count":
        raise SettingsError(f"[rules] late = 'count' {why}; a sum is of one round's uploads")
    if rules.buffer is not None:
        raise SettingsError(f"[rules] buffer = {rules.buffer} {why}; a sum is of all that trained")
    if screening.firewall.norm_limit is not None:
        raise SettingsError(f"[firewall] norm_limit {why}; the server sees no single upload")
