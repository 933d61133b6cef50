"""The rules by which a server accepts or rejects the uploads of a round."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedalt.engine.dry_run import Form
from fedalt.engine.firewall import Firewall, Refused, Size, check_size, check_upload, too_large
from fedalt.engine.robust import Robust
from fedalt.methods.contract import Message


@dataclass(frozen=True)
class Screening:
    """The rules of a round; `robust` takes the place of the method's mean, `trim` is its share."""

    firewall: Firewall = field(default_factory=Firewall)
    robust: Robust | None = None
    trim: float = 0.1

    def screened(
        self, open_: Callable[[], Message], size: int, forms: Sequence[Form]
    ) -> tuple[Message | None, str]:
        """An upload of `size` bytes; None and why if its size, form or numbers are rejected.

        `open_` makes a message of those bytes once they are few enough; `forms` are those that the
        method's uploads may have, see `dry_run`.
        """
        try:
            check_size(size, self.firewall.max_upload_bytes)
            message = open_()
            check_upload(message, forms)
        except Refused as error:
            return None, str(error)
        return message, ""

    def outliers(self, sizes: Mapping[str, Size]) -> dict[str, str]:
        """Who of a round's clients is rejected for an upload too large beside the others'."""
        limit = self.firewall.norm_limit
        return {} if limit is None else too_large(sizes, limit)
