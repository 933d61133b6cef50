"""Who keeps the ledger of privacy in a federation: the server, or a client for its own texts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from fedalt.engine.members import Members
from fedalt.engine.privacy import PrivacyError, Release
from fedalt.federation.accepted import Accepted
from fedalt.federation.agreement import Agreement
from fedalt.federation.messages import NEVER, Answer
from fedalt.federation.owner_messages import Say
from fedalt.runs.budget import RunBudget, budget_of
from fedalt.runs.folder import RunFolder

SPENT: Final = "epsilon"  # the metric with which a client says what it has spent


def begin_private(
    folder: RunFolder, agreement: Agreement, round_: int, cohort: Sequence[str], say: Say
) -> tuple[Sequence[str], dict[str, object], Release | None]:
    """Count a round before anyone is called: who trains, what the record says of it, its noise.

    Where the budget does not allow it nobody trains: terms stay as they are, so a round is held for
    each of theirs. Where clients add the noise themselves the server counts nothing.
    """
    settings = agreement.settings
    if settings.privacy.unit != "client":
        return cohort, {}, None
    begun, members = folder.rounds_done(), Members(agreement.clients)
    budget = budget_of(folder.path, settings, members, lambda _: 1, begun)
    assert budget is not None
    try:
        spent = budget.begin(cohort)
    except PrivacyError as error:
        say(f"round {round_ + 1}: nobody trains: {error}")
        return (), {}, None
    return cohort, spent, budget.release(settings.method, folder.states("own", round_), round_)


def client_budget(
    accepted: Accepted, agreement: Agreement, client_id: str, examples: int
) -> RunBudget | None:
    """What a client counts of its own examples: as many rounds at least as its folder says.

    Where clients are what is protected it only bounds its upload, and the server counts.
    """
    members, only = Members(agreement.clients), (client_id,)
    begun = accepted.begun or int(accepted.round != NEVER)
    folder, settings = accepted.folder, agreement.settings
    return budget_of(folder, settings, members, lambda _: examples, begun, only)


def own_spending(
    budget: RunBudget | None, client_id: str, accepted: Accepted
) -> Mapping[str, float]:
    """Count a client's round before it begins, where it counts; what it tells the server of it.

    How many were counted is also put into what its folder says, beside its ledger.
    """
    if budget is None or budget.privacy.unit == "client":
        return {}
    spent = budget.begin((client_id,))[SPENT]
    accepted.begun = budget.begun
    accepted.write(accepted.round)
    return {SPENT: float(spent)} if isinstance(spent, float) else {}


def told_by(
    agreement: Agreement, answers: Iterable[Answer], lines: Iterable[Mapping[str, Any]]
) -> dict[str, object]:
    """What a round's answers tell of privacy, for the record: the most of any client up to now.

    `lines` are those recorded before: who has spent most need not be in the round.
    """
    spent = [
        cost.metrics[SPENT]
        for answer in answers
        for cost in answer.costs
        if cost.column == "own" and SPENT in cost.metrics
    ]
    if not spent:
        return {}
    spent += [line[SPENT] for line in lines if line["kind"] == "round" and SPENT in line]
    return {SPENT: max(spent), "delta": agreement.settings.privacy.delta}
