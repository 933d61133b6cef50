"""The settings of what clients send: how it is checked, what it hides, how it is shortened."""

from typing import Annotated, Literal

from fedalt.core.declared import declared, setting


@declared
class Firewall:
    """Which uploads the server accepts; names, shapes and finite numbers are always checked."""

    # A limit of 1 would be the median itself.
    norm_limit: Annotated[
        float | None,
        setting(
            "Reject an upload whose norm or weight is this many times the median of its round.",
            flag=None,
            gt=1,
        ),
    ] = None
    max_upload_bytes: Annotated[int, setting("Largest upload, in bytes.", flag=None, ge=1)] = 2**30
    quarantine_bytes: Annotated[
        int, setting("How much of rejected uploads is kept, in bytes.", flag=None, ge=0)
    ] = 2**30


@declared
class Privacy:
    """What a round tells of a client: differential privacy, and sums in the place of uploads."""

    unit: Annotated[
        Literal["client", "example"] | None,
        setting("What is protected: all data of a client, or each training example.", flag=None),
    ] = None
    epsilon: Annotated[
        float | None,
        setting("Budget of the run, for which noise is solved; or give noise.", flag=None, gt=0),
    ] = None
    noise: Annotated[
        float | None,
        setting("Noise multiplier: standard deviation of the noise over clip.", flag=None, ge=0),
    ] = None
    delta: Annotated[
        float, setting("The delta at which epsilon is stated.", flag=None, gt=0, lt=1)
    ] = 1e-5
    clip: Annotated[
        float | None,
        setting("Largest norm of a client's change or an example's gradient.", flag=None, gt=0),
    ] = None
    quantile: Annotated[
        float | None,
        setting(
            "Quantile of the norms of clients' changes that the limit, clip at first, follows.",
            flag=None,
            gt=0,
            lt=1,
        ),
    ] = None
    seed: Annotated[
        int | None,
        setting("Makes the noise repeatable, and thereby worthless as protection.", flag=None),
    ] = None
    secure_sum: Annotated[
        bool, setting("Whether a federation's server learns sums alone and no upload.", flag=None)
    ] = False

    def __post_init__(self) -> None:
        keys = ("epsilon", "noise", "clip", "quantile", "seed")
        given = [key for key in keys if getattr(self, key) is not None]
        if self.unit is None:
            if given:
                raise ValueError(
                    f"{given[0]} is given without unit; say whose data are protected: "
                    'unit = "client" or unit = "example"'
                )
        elif self.clip is None:
            raise ValueError("clip is missing: without a largest norm no noise hides anything")
        elif self.quantile is not None and self.unit != "client":
            raise ValueError(
                'quantile is about clients\' changes, so it needs unit = "client"; the clip of '
                "examples' gradients stays"
            )
        elif self.quantile is not None and self.secure_sum:
            raise ValueError(
                "quantile tells the server of each upload whether it was clipped, which secure_sum "
                "is there to hide; leave out one of them"
            )
        elif (self.epsilon is None) == (self.noise is None):
            both = "both are given" if self.epsilon is not None else "neither is"
            raise ValueError(
                "epsilon is the budget that noise is solved for, noise is given instead of it: "
                f"exactly one is expected, but {both}"
            )


@declared
class Traffic:
    """How messages become shorter on their way, see docs/traffic.md."""

    upload: Annotated[
        Literal["float32", "bf16", "int8", "int4"],
        setting(
            "Uploads in full, or their change since the last accepted one in fewer bits a number.",
            flag=None,
        ),
    ] = "float32"
    download: Annotated[
        Literal["exact", "float32", "bf16", "int8", "int4"],
        setting(
            "What the server sends as the method has it, or in float32, or its change since the "
            "round before in fewer bits a number.",
            flag=None,
        ),
    ] = "exact"
