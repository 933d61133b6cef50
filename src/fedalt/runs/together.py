"""Which settings of a run make no sense beside which others."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedalt.core.declared import SettingsError
from fedalt.core.settings import Schedule, Stay, Training
from fedalt.core.upload_settings import Firewall, Privacy, Traffic
from fedalt.methods import METHODS

if TYPE_CHECKING:
    from fedalt.methods.contract import AnyMethod
else:  # a method's class needs torch
    AnyMethod = Any


def require_together(
    method: AnyMethod,
    training: Training,
    schedule: Schedule,
    firewall: Firewall,
    privacy: Privacy,
    traffic: Traffic,
    clients: Mapping[str, Stay],
    source: str,
) -> None:
    """Raise SettingsError, which begins with `source`, for settings that exclude each other."""
    if schedule.robust is not None and not method.averages:
        able = ", ".join(name for name, other in METHODS.items() if other.averages)
        raise SettingsError(
            f"{source}: [rounds] robust: {METHODS.name_of(method)!r} does more with uploads "
            f"than to average them; methods that only do that are {able}"
        )
    if training.carry_optimizer and getattr(method, "renewed", False):
        raise SettingsError(
            f"{source}: [training] carry_optimizer: clients of {METHODS.name_of(method)!r} train "
            "something else from round to round, such as other rank rows or another factor, and "
            "moments of what was trained before do not belong to it; leave it out"
        )
    leavers = [name for name, stay in clients.items() if stay.leaves is not None]
    if leavers and (fault := fault_of_leaving(privacy, traffic)):
        raise SettingsError(f"{source}: [clients.{leavers[0]}] leaves: {fault}")
    if privacy.unit is not None:
        from fedalt.runs.privacy import require_private  # brings what computes

        require_private(method, privacy, schedule, firewall, traffic, source)
    if privacy.secure_sum:
        from fedalt.runs.privacy import require_summable

        require_summable(method, schedule, firewall, traffic, source)


def fault_of_leaving(privacy: Privacy, traffic: Traffic) -> str:
    """Why no client's part can be taken out of the server's state, in a clause; "" if it can."""
    if privacy.secure_sum:
        return "with [privacy] secure_sum the server does not know anyone's part"
    if privacy.unit == "client":
        return (
            "with [privacy] unit = 'client' a part cannot be taken out again: it carries the noise "
            "that hides it"
        )
    if traffic.download != "exact":
        return (
            f"with [traffic] download = {traffic.download!r} clients go on with what they have "
            "received; only download = 'exact' lets one leave"
        )
    return ""


def require_seen(privacy: Privacy) -> None:
    """SettingsError for a secure sum where one machine sees all clients' uploads anyway."""
    if privacy.secure_sum:
        raise SettingsError(
            "[privacy] secure_sum is for a federation, `fedalt federation init`; on one machine "
            "there is nobody to hide an upload from, and without it the numbers are the same but "
            "for rounding"
        )
