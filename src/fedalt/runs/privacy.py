"""Which settings of [privacy] make sense together with the others of a run."""

from fedalt.core.declared import SettingsError
from fedalt.core.settings import Schedule
from fedalt.core.upload_settings import Firewall, Privacy, Traffic
from fedalt.engine.accounting import require_accounting
from fedalt.engine.privacy_checks import adds_up, faults, mean_suffices, weighs_alike
from fedalt.methods import METHODS
from fedalt.methods.contract import AnyMethod


def require_private(
    method: AnyMethod,
    privacy: Privacy,
    schedule: Schedule,
    firewall: Firewall,
    traffic: Traffic,
    source: str,
) -> None:
    """Raise SettingsError where [privacy] asks for what these rounds cannot give."""
    if privacy.unit is None:
        return
    place = f"{source}: [privacy] unit = {privacy.unit!r}"
    require_accounting()
    name = METHODS.name_of(method)
    if METHODS.is_local_only(method):
        raise SettingsError(f"{place}: {name!r} sends nothing, so there is nothing to protect")
    for fault in faults(method, privacy, schedule.rounds):
        raise SettingsError(f"{place}: {name!r}: {fault}")
    if privacy.unit == "example":
        return
    if schedule.robust is not None:
        raise SettingsError(f"{place}: [rounds] robust is no sum, for which the noise would do")
    if firewall.norm_limit is not None:
        raise SettingsError(
            f"{place}: [firewall] norm_limit rejects uploads by what others have sent, which no "
            "noise hides; clip bounds every upload already"
        )
    if (form := traffic.upload) != "float32":
        raise SettingsError(
            f"{place}: [traffic] upload = {form!r} rounds what was clipped, so that an upload may "
            "move by more than clip; leave it out"
        )
    if schedule.select == "best":
        raise SettingsError(
            f"{place}: [rounds] select = 'best' chooses by validation losses, which no noise "
            'hides; write select = "last"'
        )


def require_summable(
    method: AnyMethod, schedule: Schedule, firewall: Firewall, traffic: Traffic, source: str
) -> None:
    """Raise SettingsError where these rounds need more of an upload than its part of a sum."""
    place, name = f"{source}: [privacy] secure_sum", METHODS.name_of(method)
    if METHODS.is_local_only(method):
        raise SettingsError(f"{place}: {name!r} sends nothing, so there is nothing to hide")
    if not (method.averages or adds_up(method)):
        raise SettingsError(
            f"{place}: the server of {name!r} does more with uploads than to add them up or to "
            "average them, so it has to see each"
        )
    if not weighs_alike(method):
        raise SettingsError(
            f"{place}: {name!r}: an upload's weight tells how many examples a client has; write "
            'weighting = "uniform"'
        )
    if not mean_suffices(method):
        raise SettingsError(f"{place}: the server of {name!r} needs more than the mean of uploads")
    if schedule.robust is not None:
        raise SettingsError(
            f"{place}: [rounds] robust = {schedule.robust!r} looks at single uploads, which the "
            "server never sees"
        )
    if firewall.norm_limit is not None:
        raise SettingsError(
            f"{place}: [firewall] norm_limit compares single uploads, which the server never sees; "
            "leave it out"
        )
    if (form := traffic.upload) != "float32":
        raise SettingsError(
            f"{place}: [traffic] upload = {form!r} sends a change, but masks leave nothing to "
            "shorten; leave it out"
        )
