"""The agreed settings on one client's machine: where data and base model lie there."""

from dataclasses import replace
from pathlib import Path

from fedalt.federation.agreement import Agreement
from fedalt.models.identity import parts_that_differ
from fedalt.runs.settings import Settings, SettingsError
from fedalt.runs.setup import Parts


def settings_here(
    agreement: Agreement, data: Path, model: str | None = None, device: str | None = None
) -> Settings:
    """The agreed settings, with what lies elsewhere on this client's machine."""
    agreed = agreement.settings
    name, place = model or agreed.model.name, device or agreed.model.device
    return replace(
        agreed,
        data=replace(agreed.data, path=data),
        model=replace(agreed.model, name=name, device=place),
    )


def require_model(parts: Parts, agreement: Agreement) -> None:
    """Raise SettingsError for another base model than the agreed one."""
    here, agreed = parts.base.fingerprint, agreement.model
    if here != agreed:
        raise SettingsError(
            f"the base model {parts.base.name!r} here has the fingerprint {here!r}, but "
            f"terms.toml of {agreement.name!r} names {agreed!r}: it is another model, with "
            f"other {parts_that_differ(agreed, here)}"
        )
