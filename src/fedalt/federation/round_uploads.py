"""A round's uploads at the server: read from the answers on disk, and told what becomes of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedalt.core.codec import read
from fedalt.core.reading import read_bytes
from fedalt.engine.blame import control_of
from fedalt.engine.screening import Arrival
from fedalt.federation.messages import Answer
from fedalt.federation.round_collector import Desk
from fedalt.methods.contract import Message


@dataclass(frozen=True)
class RoundUploads:
    """See `engine.blame.Uploads`; what is decided of each client goes into `verdicts`."""

    desk: Desk
    verdicts: dict[str, str | None]

    @property
    def clients(self) -> Sequence[str]:
        """Whose uploads there are, sorted."""
        return sorted(self.desk.uploads)

    def arrival(self, client_id: str) -> Arrival:
        """An upload out of the answer as it came; it was checked then."""
        file = self.desk.answer_file(client_id)
        data = read_bytes(file)
        upload = read(Answer, file, of=lambda _: data).upload
        assert upload is not None
        return Arrival(client_id, upload, data, None, lambda _: None)

    def control(self, client_id: str) -> Message:
        """A harmless upload of the same form."""
        return control_of(self.arrival(client_id).upload, self.desk.forms(client_id))

    def decide(self, client_id: str, reason: str | None) -> None:
        """Put it down."""
        self.verdicts[client_id] = reason
