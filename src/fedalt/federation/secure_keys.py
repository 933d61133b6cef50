"""Which keys a round of a secure sum is about, and who has signed them."""

import re
from typing import Final, Protocol

from fedalt.engine.firewall import Refused, quoted
from fedalt.federation.agreement import Agreement
from fedalt.federation.messages import RoundKeys
from fedalt.federation.secure_sum import SecureSumError, threshold

_HEX: Final = re.compile("([0-9a-f]{2}){1,256}")


class Signatures(Protocol):
    """The long-term keys of a federation's clients, as whoever holds this has got them."""

    def sign(self, content: bytes) -> bytes:
        """A signature of its own."""
        ...

    def check(self, client_id: str, content: bytes, signature: bytes) -> None:
        """Raise SecureSumError unless that client has signed this."""
        ...


def signed_of(agreement: Agreement, client_id: str, round_: int, keys: RoundKeys) -> bytes:
    """What a client signs of its keys: whose they are, and for which round of which federation."""
    about = about_of(agreement, round_)
    return f"fedalt secure sum, {about}: {client_id}: {keys.mask} {keys.share}".encode()


def check_keys(
    signatures: Signatures, agreement: Agreement, client_id: str, round_: int, keys: RoundKeys
) -> None:
    """Refuse keys that their client has not signed."""
    content = signed_of(agreement, client_id, round_, keys)
    try:
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
