"""Which keys a round of a secure sum is about, and who has signed them."""

import re
from secrets import token_bytes
from typing import Final, Protocol

from fedalt.core.container import dump
from fedalt.engine.changes import digest_of
from fedalt.engine.firewall import Refused, quoted
from fedalt.federation.agreement import Agreement
from fedalt.federation.messages import RoundKeys, digest
from fedalt.federation.secure_sum import KEY, SecureSumError, agree, threshold
from fedalt.methods.contract import Message

_HEX: Final = re.compile("([0-9a-f]{2}){1,256}")
_KEY: Final = re.compile(f"[0-9a-f]{{{2 * KEY}}}")


class Signatures(Protocol):
    """The long-term keys of a federation's clients, as whoever holds this has got them."""

    def sign(self, content: bytes) -> bytes:
        """A signature of its own."""

    def check(self, client_id: str, content: bytes, signature: bytes) -> None:
        """Raise SecureSumError unless that client has signed this."""


def signed_of(
    agreement: Agreement, client_id: str, round_: int, keys: RoundKeys, sent: str
) -> bytes:
    """What a client signs of its keys: whose they are, for which round of which federation.

    And what it was `sent`, as `digest_of_sent` has it: clients whose broadcasts differ have no sum
    in common. One that alone has trained on numbers, others on zeros, would be all there is in it.
    """
    about = about_of(agreement, round_)
    return f"fedalt secure sum, {about}: {client_id}: {keys.mask} {keys.share} on {sent}".encode()


def digest_of_sent(message: Message) -> str:
    """What tells broadcasts of one round apart.

    Facts that are true or false are about a single client, as FedALT's `included` is, and left out.
    """
    facts = {key: fact for key, fact in message.facts.items() if type(fact) is not bool}
    return digest(f"{digest_of(message.tree)} {dump(facts)}".encode())


def check_keys(
    signatures: Signatures,
    agreement: Agreement,
    client_id: str,
    round_: int,
    keys: RoundKeys,
    sent: Message,
) -> None:
    """Refuse keys that nobody can agree on anything with, or that their client has not signed.

    Every other client would fail on them, and so every sum.
    """
    content = signed_of(agreement, client_id, round_, keys, digest_of_sent(sent))
    try:
        for what, key in (("masks", keys.mask), ("shares", keys.share)):
            if not _KEY.fullmatch(key):
                raise Refused(
                    f"its key for {what} is {quoted(key)}, expected {2 * KEY} hexadecimal digits"
                )
            agree(token_bytes(KEY), bytes.fromhex(key), "a try")
        signatures.check(client_id, content, from_hex(keys.signature))
    except SecureSumError as error:
        raise Refused(str(error)) from None


def about_of(agreement: Agreement, round_: int) -> str:
    """What keys of one round are told apart by from those of any other."""
    return f"{agreement.name}, {agreement.digest}, round {round_}"


def fewest(agreement: Agreement) -> int:
    """How many clients must stay to a sum's end: two thirds of a round's cohort."""
    settings = agreement.settings
    return threshold(len(settings.rounds.cohort(agreement.clients, 0, settings.seed)))


def from_hex(text: str) -> bytes:
    """The bytes behind hexadecimal digits, of which there are few. Raises SecureSumError."""
    if not _HEX.fullmatch(text):
        raise SecureSumError(f"{quoted(text)}: expected bytes in hexadecimal digits")
    return bytes.fromhex(text)
