"""The server's part in a secure sum: what it asks in turn, and what comes of the sum."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedalt.core.tree import Tree
from fedalt.engine.dry_run import DryRuns
from fedalt.engine.round import ClientRound, Outcome
from fedalt.engine.states import States
from fedalt.engine.uploads import Upload
from fedalt.federation.agreement import Agreement
from fedalt.federation.messages import Answer, RoundKeys, SumAnswer
from fedalt.federation.secure_calls import SumCalls
from fedalt.federation.secure_client import MASKED
from fedalt.federation.secure_keys import about_of, fewest, from_hex
from fedalt.federation.secure_sum import (
    MASK,
    SECRET,
    SEED,
    SecureSumError,
    join,
    public_of,
    require_enough,
    signed,
    steps_of,
    stretched,
    tree_of,
    unmask,
)
from fedalt.methods.contract import Message

_RUNNING: Final = "server/running"


@dataclass(frozen=True)
class Running:
    """The sum of all clients' latest uploads, as integers, and whose are in it."""

    TAG: ClassVar = "sum-running"

    total: Tree
    clients: tuple[str, ...]


@dataclass
class SecureRound:
    """The secure sum of one round; `refused` says why there is none, if there is none."""

    agreement: Agreement
    calls: SumCalls
    refused: str = ""
    present: tuple[str, ...] = ()
    _running: Running | None = None

    @property
    def begun(self) -> bool:
        """Whether it is fixed already who has trained."""
        return self.calls.is_fixed("share")

    def uploads(
        self, trained: Mapping[str, Answer], states: States, sent: Callable[[str], Message]
    ) -> Iterator[Upload]:
        """In the place of each client's upload the mean of all, which is all that can be known.

        A method that averages makes the same of that, and so does one that sums up everybody's
        latest upload. Where there is no sum there are no uploads; `refused` says why.
        """
        forms = DryRuns(self.agreement.settings.method, self.agreement.init)
        self.refused, needed = "", fewest(self.agreement)
        try:
            keys = {who: answer.keys for who, answer in trained.items() if answer.keys is not None}
            names = self.calls.fixed("share", keys)
            _require_there(names, keys)
            require_enough(names, needed, "have trained")
            keys = {who: keys[who] for who in names}
            like = forms(names[0], sent(names[0]))[-1]
            size = sum(tensor.numel() for tensor in like.tree.values())
            total = self._sum(keys, needed, size)
        except SecureSumError as error:
            self.refused = str(error)
            self.calls.tell(f"no secure sum: {error}")
            return
        whole, clients = self._counted(total, states)
        steps = steps_of(len(self.agreement.clients)) * len(clients)
        message = Message(tree_of(whole, steps, like.tree), like.facts)
        for client_id in clients:
            yield Upload(client_id, message, 0.0)

    def settle(
        self,
        trained: Mapping[str, Answer],
        states: States,
        outcome: Outcome,
        downloads: Mapping[str, int],
    ) -> list[ClientRound]:
        """Keep the new total once it is aggregated; the round of each client that has trained.

        Its upload counts if it is in the sum.
        """
        if outcome.aggregated and self._running is not None:
            states.put(_RUNNING, self._running)
        verdicts = {client.client_id: client.refused for client in outcome.clients}
        rounds = []
        for client_id, answer in sorted(trained.items()):
            if answer.keys is None:
                continue
            (own,) = (cost for cost in answer.costs if cost.column == "own")
            refused: str | None = self.refused or "its masked upload came too late for the sum"
            if client_id in self.present and not self.refused:
                refused = verdicts[client_id]
            up, down = self.calls.traffic.get(client_id, (0, 0))
            down += downloads.get(client_id, 0)
            rounds.append(ClientRound(client_id, up, down, own.seconds, own.metrics, refused))
        return rounds

    def _sum(self, keys: Mapping[str, RoundKeys], needed: int, size: int) -> NDArray[np.int64]:
        """The sum of this round's uploads, or their changes, as integers."""
        calls = {who: self.calls.call(who, "share", keys=keys) for who in keys}
        shared = self.calls.step("share", calls, needed, partial(_require_sealed, clients=keys))
        names = self.calls.fixed("mask", shared)
        _require_there(names, shared)
        calls = {
            who: self.calls.call(
                who, "mask", sealed={u: shared[u].sealed[who] for u in names if u != who}
            )
            for who in names
        }
        sent = self.calls.step("mask", calls, needed, partial(_require_masked, size=size))
        self.present = self.calls.fixed("unmask", sent)
        _require_there(self.present, sent)
        calls = {who: self.calls.call(who, "unmask", present=self.present) for who in self.present}
        gone = [who for who in names if who not in self.present]
        check = partial(_require_shares, present=self.present, gone=gone)
        told = self.calls.step("unmask", calls, needed, check, enough=needed)
        total = np.zeros(size, np.uint32)
        for who in self.present:
            total = total + sent[who].masked[MASKED].numpy().view(np.uint32)
        number = {who: at for at, who in enumerate(sorted(keys))}  # of a client's shares

        def key_of(who: str, shares: Mapping[str, Mapping[str, str]], purpose: str) -> bytes:
            of_one = {number[other]: from_hex(told[who]) for other, told in shares.items()}
            return stretched(join(of_one, needed), purpose)

        seeds_told = {other: answer.seeds for other, answer in told.items()}
        keys_told = {other: answer.keys for other, answer in told.items()}
        seeds = [key_of(who, seeds_told, SEED) for who in self.present]
        secrets = {who: key_of(who, keys_told, MASK) for who in gone}
        for who, secret in secrets.items():
            if public_of(secret).hex() != keys[who].mask:
                raise SecureSumError(f"the shares of {who!r} do not give its key")
        publics = {who: from_hex(keys[who].mask) for who in self.present}
        about = about_of(self.agreement, self.calls.collector.round)
        total = unmask(total, seeds, secrets, publics, about)
        return signed(total, len(self.present), steps_of(len(self.agreement.clients)))

    def _counted(
        self, whole: NDArray[np.int64], states: States
    ) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """The sum that the method is given, and of whose uploads it is."""
        if self.agreement.settings.method.averages:
            return whole, self.present
        before = states.get(_RUNNING, Running) or Running({}, ())
        if before.total:
            whole = whole + before.total[MASKED].numpy()
        clients = tuple(sorted({*before.clients, *self.present}))
        self._running = Running({MASKED: torch.from_numpy(whole)}, clients)
        return whole, clients


def _require_there(names: Collection[str], answers: Collection[str]) -> None:
    """Refuse to go on where what a step was fixed for is on disk no more."""
    if lost := set(names) - set(answers):
        raise SecureSumError(f"what {min(lost)!r} has answered is not here any more")


def _require_masked(answer: SumAnswer, size: int) -> None:
    tensor = answer.masked.get(MASKED)
    if tensor is None or len(answer.masked) != 1:
        raise SecureSumError("it has no masked upload")
    if tensor.dtype != torch.int32 or tuple(tensor.shape) != (size,):
        raise SecureSumError(
            f"its masked upload is {tuple(tensor.shape)} of {tensor.dtype}, expected ({size},) of "
            "torch.int32"
        )


def _require_sealed(answer: SumAnswer, clients: Collection[str]) -> None:
    """Refuse an answer without something sealed for each other client."""
    _require_keys(answer.sealed, set(clients) - {answer.client}, "sealed shares")
    for sealed in answer.sealed.values():
        from_hex(sealed)


def _require_shares(answer: SumAnswer, present: Collection[str], gone: Collection[str]) -> None:
    """Refuse an answer without a share of a seed or of a key of each of these clients."""
    for shares, names in ((answer.seeds, present), (answer.keys, gone)):
        _require_keys(shares, names, "shares")
        for share in shares.values():
            if len(from_hex(share)) != SECRET:
                raise SecureSumError(f"a share of {len(share) // 2} bytes, expected {SECRET}")


def _require_keys(given: Collection[str], names: Collection[str], what: str) -> None:
    if set(given) != set(names):
        raise SecureSumError(f"it has {what} of {len(given)} clients, expected {len(names)} others")
