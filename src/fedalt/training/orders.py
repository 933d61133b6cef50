"""What a method may ask of a client's data and the base model, and what it is answered with."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Protocol

from torch import Tensor

from fedalt.adapters.plan import HEAD, Plan
from fedalt.core.tree import Name, Tree

MOST_SPARED: Final = 32  # training examples kept from training so that a search can look at them


@dataclass(frozen=True)
class Moments:
    """AdamW's running means and its number of steps, so that later training can go on with them."""

    TAG: ClassVar = "moments"

    first: Tree = field(default_factory=dict)
    second: Tree = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True)
class Stepped:
    """What a method's own step made: a loss to report, gradients for AdamW, and moved tensors."""

    loss: Tensor
    gradients: Tree
    moved: Tree


class Step(Protocol):
    """A training step of a method's own, in the place of plain descent."""

    @property
    def moves(self) -> str:
        """The slot that the step moves itself; AdamW moves all other trained names."""

    def __call__(
        self, tree: Tree, train: Sequence[Name], loss: Callable[[Tree, int], Tensor]
    ) -> Stepped:
        """One step for the names in `train`, whose tensors require gradients.

        `loss(tree, 0)` is the mean loss on the step's batch, `loss(tree, 1)` that on the next one;
        for one batch it always draws the same dropout masks.
        """


def as_it_is(tree: Tree) -> Tree:
    """The tree that is trained is the one that is bound."""
    return tree


@dataclass(frozen=True)
class Fit:
    """An order to the engine: train the names in `train` of this tree under this plan.

    `compose` makes of the tree the one that is bound, which holds every tensor the plan needs and
    the head's, if the base model has one; gradient flows through it. Names outside `train` stay
    frozen, but gradient flows through them too. The answer is a `Fitted`.

    `epochs` is None for the run's own number of local epochs; `rate` multiplies the run's learning
    rate. `spare` is the share of the training examples to leave out, those that a `Search` with
    the same share is answered with. `moments`: AdamW's state to go on with, `Moments()` at first,
    None for a new one that is forgotten afterwards. `penalty` of the tree is added to the loss.
    `head` is what a head that trains is counted as, for clients that have more than one.
    """

    plan: Plan
    tree: Tree
    train: frozenset[Name]
    epochs: int | None = None
    rate: float = 1.0
    spare: float = 0.0
    moments: Moments | None = None
    compose: Callable[[Tree], Tree] = as_it_is
    penalty: Callable[[Tree], Tensor] | None = None
    step: Step | None = None
    head: str = HEAD

    @property
    def descending(self) -> frozenset[Name]:
        """The names that AdamW moves: all that train, but for those that the step moves itself."""
        own = self.step.moves if self.step else None
        return frozenset(name for name in self.train if name.slot != own)

    @property
    def trained_numbers(self) -> Mapping[tuple[str, str], int]:
        """How many numbers of each slot and factor it trains."""
        numbers: Counter[tuple[str, str]] = Counter()
        for name in self.train:
            slot = self.head if name.slot == HEAD else name.slot
            numbers[slot, name.factor] += self.tree[name].numel()
        return numbers


@dataclass(frozen=True)
class Fitted:
    """The answer to a `Fit`: the whole tree after training, on how many examples, and moments."""

    tree: Tree
    examples: int
    moments: Moments = Moments()


@dataclass(frozen=True)
class Embed:
    """An order: what the model of this plan and tree makes of some of the client's own prompts.

    The answer is a tensor (examples, hidden): the last hidden state at each prompt's last token.
    The prompts are `examples` training examples of the client, always the same ones; all of them
    where it has fewer.
    """

    plan: Plan
    tree: Tree
    examples: int


@dataclass(frozen=True)
class Search:
    """An order: numbers with a low loss on the spared examples, found without gradients.

    Minimises loss(tree_of(numbers)) + penalty(numbers) from `start`, each number within +-`bound`,
    in at most `evaluations` looks at the loss. `spare` is the share of the training examples to
    look at, at most `most` of them. The answer is a `Found`, never worse than `start`. A search of
    no numbers is one look: see `look_at`.
    """

    plan: Plan
    tree_of: Callable[[Sequence[float]], Tree]
    penalty: Callable[[Sequence[float]], float]
    start: tuple[float, ...]
    bound: float
    evaluations: int
    spare: float
    most: int | None = MOST_SPARED


@dataclass(frozen=True)
class Found:
    """The answer to a `Search`: the best numbers seen, and what was minimised, there."""

    numbers: tuple[float, ...]
    objective: float


def look_at(plan: Plan, tree: Tree) -> Search:
    """An order: the loss of this tree on all of the client's training examples.

    It is the `objective` of the answer, infinity where it is not finite.
    """
    return Search(plan, lambda _: tree, lambda _: 0.0, (), 0.0, 1, spare=1.0, most=None)


Order = Fit | Embed | Search
