"""What an answer's upload, costs and keys are held against: what a dry run of its call comes to.

And uploads whose round is over: whether they count in a later one, and how much.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fedalt.engine.dry_run import DryRuns, Form, dry_run
from fedalt.engine.firewall import Refused, check_upload
from fedalt.engine.traffic import Coding
from fedalt.federation.agreement import Agreement
from fedalt.federation.answer_schema import Asked, check_trained
from fedalt.federation.messages import Answer, Call
from fedalt.federation.rules import Rules
from fedalt.federation.secure_keys import Signatures, check_keys
from fedalt.methods.contract import Message
from fedalt.methods.local import LocalOnly
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.settings import lora_of


class Late(Exception):  # noqa: N818 - nobody's mistake
    """An answer whose round is over, which the rules do not let count in this one."""


def require_counting(asked: Asked, call: Call | None, rules: Rules) -> None:
    """Whether an answer to a call of an earlier round counts in the round of `call`; Late if not.

    `call` is None for a client that is not called in this round.
    """
    over = f"its answer to the call of round {asked.round + 1} came after that round had ended"
    if rules.late == "drop":
        raise Late(f"{over}; it is dropped")
    if call is None or not call.train or not asked.trains:
        raise Late(f"{over}, and it does not train in this one; it is dropped")
    if asked.accepted != call.accepted:
        raise Late(f"{over}, and another upload of it has counted since; it is dropped")


def counts(rounds: int, rules: Rules, *, averages: bool) -> float:
    """What the weight of an upload so many rounds late is multiplied by.

    A method that does more with weights than to average, such as to subtract later what was added,
    needs them as they were sent.
    """
    return float((1 + rounds) ** -rules.staleness) if averages else 1.0


@dataclass(frozen=True)
class AnswerForms:
    """The forms of a round's answers; `signatures` tell whose keys of a secure sum are whose."""

    agreement: Agreement
    coding: Coding
    states: FileStates
    signatures: Signatures | None

    def require(self, client_id: str, answer: Answer, sent: Message, *, late: bool = False) -> None:
        """Raise Refused for what no training comes to on what the client was `sent`.

        A `late` answer was to another broadcast, on which an honest client may have trained other
        tensors: it is no use in this round, so Late is raised.
        """
        try:
            self._require(client_id, answer, sent)
        except Refused as error:
            if not late:
                raise
            what = f"its upload of round {answer.round + 1}"
            raise Late(f"{what} is not of the form of this one's: {error}; it is dropped") from None

    def _require(self, client_id: str, answer: Answer, sent: Message) -> None:
        if answer.upload is None and answer.keys is None:
            return
        forms = self._own(client_id, sent)
        check_trained(answer.costs, {"own": forms, "local": self._alone})
        if answer.upload is not None:
            check_upload(self.coding.open(self.states, client_id, answer.upload, forms), forms)
        if answer.keys is not None and self.signatures is not None:
            about = self.agreement, client_id, answer.round
            check_keys(self.signatures, *about, answer.keys, sent)

    @cached_property
    def _own(self) -> DryRuns:
        return DryRuns(self.agreement.settings.method, self.agreement.init)

    @cached_property
    def _alone(self) -> Sequence[Form]:
        """What training of the local-only baseline looks like."""
        baseline = LocalOnly(lora=lora_of(self.agreement.settings.method))
        return dry_run(baseline, self.agreement.init, "", Message({}))
