"""A client's part in a secure sum: what it tells, to whom, and what it never tells twice.

    sum.safetensors               the round's secrets, and what was answered already
    sum-mask.bin                  the answer of a step, sent again if it is asked for again
    clients/ID/upload/0007...     the upload of round 7, which only its masked form leaves

All of it lies in the client's folder, beside its states.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import token_bytes
from typing import ClassVar, Final

import torch

from fedalt.core.codec import atomic_write, encode, read, write
from fedalt.core.foreign import shown
from fedalt.core.reading import read_bytes
from fedalt.core.tree import Name
from fedalt.engine.firewall import quoted
from fedalt.federation.agreement import Agreement
from fedalt.federation.messages import RoundKeys, Step, SumAnswer, SumCall, digest
from fedalt.federation.owner_messages import Say, silent
from fedalt.federation.secure_keys import (
    Signatures,
    about_of,
    digest_of_sent,
    fewest,
    from_hex,
    signed_of,
)
from fedalt.federation.secure_sum import (
    KEY,
    MASK,
    SECRET,
    SEED,
    SecureSumError,
    StepOverError,
    agree,
    integers,
    masked,
    modulo,
    public_of,
    require_enough,
    seal,
    split,
    steps_of,
    stretched,
    unseal,
)
from fedalt.methods.contract import Message
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.kept import Kept

MASKED: Final = Name("", "sum", "masked")  # the one tensor of a masked upload
_TRAIN: Final = "train"  # before all steps of a sum


@dataclass(frozen=True)
class Session:
    """What a client has to remember of a round's sum; bytes in hexadecimal digits.

    Secret are `share`, a key, and `mask` and `seed`, of which others get shares. `keys` are those
    of all that have trained, `own` its own shares, `sealed` what the others have sealed for it, and
    `answered` the digest of the call of each step that it has answered, and of what it was sent
    to train on.
    """

    TAG: ClassVar = "sum-session"

    round: int
    mask: str
    share: str
    seed: str
    own: str = ""
    keys: Mapping[str, RoundKeys] = field(default_factory=dict)
    sealed: Mapping[str, str] = field(default_factory=dict)
    answered: Mapping[str, str] = field(default_factory=dict)

    @property
    def mask_key(self) -> bytes:
        """The secret half of the key that masks are agreed on with."""
        return stretched(bytes.fromhex(self.mask), MASK)

    @property
    def publics(self) -> tuple[str, str]:
        """The public halves of the keys for masks and for shares."""
        return public_of(self.mask_key).hex(), public_of(bytes.fromhex(self.share)).hex()


@dataclass(frozen=True)
class SecureClient:
    """The sums of one client, in its `folder`, of whose states those count that are `kept`."""

    agreement: Agreement
    client_id: str
    folder: Path
    kept: Kept
    signatures: Signatures
    say: Say = silent

    def require_new(self, round_: int) -> None:
        """Refuse to train for a sum a second time once shares of the first have been told.

        Fresh keys would let the server ask for a sum of fewer clients, and training repeats its
        bits: the difference of both sums is what one client has uploaded.
        """
        session = read(Session, self._file) if self._file.exists() else None
        if session is not None and session.round == round_ and "share" in session.answered:
            raise StepOverError(
                f"client {self.client_id!r}: it has trained for the sum of round {round_ + 1} and "
                "shared its keys; it does not train for that sum again"
            )

    def forget(self) -> None:
        """Forget the last sum: its round is repeated, as the owner follows a server back."""
        self._file.unlink(missing_ok=True)

    def begin(self, round_: int, upload: Message, broadcast: Message) -> RoundKeys:
        """Keep an upload instead of sending it; the keys of the round's sum, signed.

        `broadcast` is what it was trained on.
        """
        integers(upload.tree, 1.0)  # its numbers fit, or it is said now
        self._states(round_).put(self._upload, upload)
        mask, seed, share = (token_bytes(size).hex() for size in (SECRET, SECRET, KEY))
        sent = digest_of_sent(broadcast)
        session = Session(round_, mask, share, seed, answered={_TRAIN: sent})
        write(self._file, session)
        keys = RoundKeys(*session.publics, signature="")
        content = signed_of(self.agreement, self.client_id, round_, keys, sent)
        return replace(keys, signature=self.signatures.sign(content).hex())

    def answer(self, call: SumCall, data: bytes) -> bytes:
        """What to send back to a step's call, which came as `data`; to the same one the same."""
        call_digest = digest(data)
        nothing = SumAnswer(
            self.agreement.name, self.agreement.digest, self.client_id, call.round, call_digest
        )
        try:
            session = self._session(call)
            answered = session.answered.get(call.step)
            if answered == call_digest:
                return read_bytes(self._sent(call.step))
            if answered is not None:
                raise StepOverError(
                    f"step {call.step!r} of this round's sum was answered already, to another call"
                )
            session, done = self._step(call, nothing, session)
            sent, answered_now = encode(done), {**session.answered, call.step: call_digest}
            # First what is sent, then that it is: of two different answers neither may ever leave.
            atomic_write(self._sent(call.step), sent)
            write(self._file, replace(session, answered=answered_now))
        except Exception as error:  # a client that ends with an error could be called to death
            self.say(f"round {call.round + 1}: step {call.step!r} of the secure sum: {error}")
            is_told = isinstance(error, SecureSumError)  # others may quote this machine's paths
            text = str(error) if is_told else f"{type(error).__name__}; what it prints says more"
            error_ = shown(f"client {self.client_id!r}: {text}")
            return encode(replace(nothing, error=error_, over=isinstance(error, StepOverError)))
        return sent

    def _session(self, call: SumCall) -> Session:
        for what, theirs, ours in (
            ("federation", call.federation, self.agreement.name),
            ("client", call.client, self.client_id),
            ("terms", call.terms, self.agreement.digest),
        ):
            if theirs != ours:
                raise SecureSumError(f"the call is for {what} {quoted(theirs)}, not {ours!r}")
        session = read(Session, self._file) if self._file.exists() else None
        if session is None or session.round != call.round:
            raise StepOverError(f"it has not trained for the sum of round {call.round + 1}")
        return session

    def _step(self, call: SumCall, done: SumAnswer, session: Session) -> tuple[Session, SumAnswer]:
        match call.step:
            case "share":
                return self._share(call, done, session)
            case "mask":
                return self._mask(call, done, session)
            case "unmask":
                return session, self._unmask(call, done, session)

    def _share(self, call: SumCall, done: SumAnswer, session: Session) -> tuple[Session, SumAnswer]:
        """Shares of this client's secrets for all whose keys are theirs."""
        self._require_part(call.keys, self.agreement.clients, "have trained")
        sent = session.answered.get(_TRAIN, "")
        for other, keys in call.keys.items():  # who was sent something else has signed that
            content = signed_of(self.agreement, other, call.round, keys, sent)
            self.signatures.check(other, content, from_hex(keys.signature))
        names, needed = sorted(call.keys), fewest(self.agreement)
        mine = call.keys[self.client_id].mask, call.keys[self.client_id].share
        if mine != session.publics:
            raise SecureSumError("the server shows other keys of this client than it has sent")
        secrets = (bytes.fromhex(session.mask), bytes.fromhex(session.seed))
        pairs = zip(*(split(secret, needed, len(names)) for secret in secrets), strict=True)
        shares = {name: first + second for name, (first, second) in zip(names, pairs, strict=True)}
        sealed = {
            other: seal(self._between(session, call.keys, other, sends=True), shares[other])
            for other in names
            if other != self.client_id
        }
        after = replace(session, keys=call.keys, own=shares[self.client_id].hex())
        return after, replace(done, sealed={other: text.hex() for other, text in sealed.items()})

    def _mask(self, call: SumCall, done: SumAnswer, session: Session) -> tuple[Session, SumAnswer]:
        """The upload, or its change, under the masks with all that have shared."""
        present = {*call.sealed, self.client_id}
        self._require_part(present, session.keys, "have shared")
        for other, sealed in call.sealed.items():  # what is damaged is told before it matters
            self._unsealed(session, other, sealed)
        steps = steps_of(len(self.agreement.clients))
        upload = self._states(call.round + 1).get(self._upload, Message)
        if upload is None:
            raise StepOverError(f"its upload of round {call.round + 1} is not here any more")
        whole = integers(upload.tree, steps)
        if not self.agreement.settings.method.averages:  # its server adds up all latest uploads
            before = self._states(call.round).get(self._upload, Message)
            whole = whole if before is None else whole - integers(before.tree, steps)
        publics = {other: from_hex(session.keys[other].mask) for other in present}
        secrets = stretched(bytes.fromhex(session.seed), SEED), session.mask_key
        about = about_of(self.agreement, call.round)
        vector = masked(modulo(whole), self.client_id, *secrets, publics, about)
        tensor = torch.from_numpy(vector.view("int32"))
        return replace(session, sealed=call.sealed), replace(done, masked={MASKED: tensor})

    def _unmask(self, call: SumCall, done: SumAnswer, session: Session) -> SumAnswer:
        """Of each other client one of the two shares, never both."""
        if "mask" not in session.answered:
            raise SecureSumError("it has sent nothing that could be unmasked")
        counted = {*session.sealed, self.client_id}
        self._require_part(call.present, counted, "are in the sum")
        shares = {
            other: self._unsealed(session, other, sealed)
            for other, sealed in session.sealed.items()
        }
        shares[self.client_id] = bytes.fromhex(session.own)
        return replace(
            done,
            seeds={
                who: share[SECRET:].hex() for who, share in shares.items() if who in call.present
            },
            keys={who: shares[who][:SECRET].hex() for who in shares.keys() - set(call.present)},
        )

    def _between(
        self, session: Session, keys: Mapping[str, RoundKeys], other: str, *, sends: bool
    ) -> bytes:
        """The key of what this client and another one send each other, one for each direction."""
        way = (self.client_id, other) if sends else (other, self.client_id)
        purpose = f"share {about_of(self.agreement, session.round)}: {way[0]} to {way[1]}"
        return agree(bytes.fromhex(session.share), from_hex(keys[other].share), purpose)

    def _unsealed(self, session: Session, other: str, sealed: str) -> bytes:
        """Another client's shares, of its secret key and of its seed."""
        key = self._between(session, session.keys, other, sends=False)
        try:
            share = unseal(key, from_hex(sealed))
            if len(share) != 2 * SECRET:
                raise SecureSumError(f"expected {2 * SECRET} bytes, got {len(share)}")
        except SecureSumError as error:  # asked again it would say the same, without end
            raise StepOverError(f"the shares that {other!r} has sent: {error}") from None
        return share

    def _require_part(self, given: Collection[str], known: Collection[str], what: str) -> None:
        """Refuse to go on with fewer than two thirds of the cohort, strangers or without itself."""
        names = set(given)
        if len(names) != len(given) or self.client_id not in names:
            raise SecureSumError(f"the list of those that {what} is not one with this client in it")
        if strangers := names - set(known):
            raise SecureSumError(f"{quoted(min(strangers))} is among those that {what}")
        require_enough(names, fewest(self.agreement), what)

    def _states(self, round_: int) -> FileStates:
        return FileStates(self.folder, round_, kept=self.kept)

    @property
    def _upload(self) -> str:
        return f"clients/{self.client_id}/upload"

    @property
    def _file(self) -> Path:
        return self.folder / "sum.safetensors"

    def _sent(self, step: Step) -> Path:
        return self.folder / f"sum-{step}.bin"
