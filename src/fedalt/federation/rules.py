"""What the operator of a federation's server decides alone."""

from typing import Annotated, Literal

from fedalt.core.declared import declared, setting


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
    minimum: Annotated[
        int, setting("Fewest uploads with which a round ends at its deadline.", flag=None, ge=1)
    ] = 1
    late: Annotated[
        Literal["count", "drop"],
        setting("A late upload counts in the next round, or is dropped.", flag=None),
    ] = "drop"
