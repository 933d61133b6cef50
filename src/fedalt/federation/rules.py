"""What the operator of a federation's server decides alone."""

from typing import Annotated, Literal

from fedalt.core.declared import SettingsError, declared, setting


@declared
class Rules:
    """What the operator of the server decides alone."""

    deadline: Annotated[
        float | None,
        setting(
            "Seconds after which a round ends with the uploads it has, if they are enough; "
            "without it a round waits for its whole cohort.",
            flag=None,
            gt=0,
        ),
    ] = None
    buffer: Annotated[
        int | None,
        setting(
            "Uploads with which a round ends at once; those of slower clients count in later "
            "rounds if late is 'count'.",
            flag=None,
            ge=1,
        ),
    ] = None
    staleness: Annotated[
        float,
        setting(
            "A late upload of s rounds ago counts 1/(1 + s) to this power in a mean; 0 in full.",
            flag=None,
            ge=0,
        ),
    ] = 0.0
    minimum: Annotated[
        int, setting("Fewest uploads with which a round ends at its deadline.", flag=None, ge=1)
    ] = 1
    late: Annotated[
        Literal["count", "drop"],
        setting("A late upload counts in the next round, or is dropped.", flag=None),
    ] = "drop"

    def __post_init__(self) -> None:
        if self.staleness and self.late != "count":
            raise SettingsError("staleness is about late uploads, which count if late = 'count'")
        if self.buffer is not None and self.buffer < self.minimum:
            raise SettingsError(f"buffer={self.buffer} is below minimum={self.minimum}")
