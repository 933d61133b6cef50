"""One example as the model sees it: ids, where the answer begins, and what counts as right."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["generate", "classify"]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Example:
    """A tokenised example.

    `ids` are prompt and answer; the answer, with the token that ends it where that fits,
    begins at `answer_start`. `answer` is its text, `options` the texts to choose from (empty for
    free text) and `option_ids` their ids as they follow the prompt, where these are known. For a
    classifier `ids` are the text, `answer_start` is its length, `options` the names of all labels
    and `label` the index of the right one; `segments` say of each id which text of a pair it
    belongs to, where the tokenizer tells. `earlier` are the positions in the prompt, ascending,
    of earlier answers that are trained as well.
    """

    ids: tuple[int, ...]
    answer_start: int
    answer: str
    options: tuple[str, ...] = ()
    label: int | None = None
    option_ids: tuple[tuple[int, ...], ...] = ()
    segments: tuple[int, ...] = ()
    earlier: tuple[int, ...] = ()

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What comes before the answer."""
        return self.ids[: self.answer_start]
