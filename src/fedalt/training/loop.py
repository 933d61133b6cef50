"""The one training loop: AdamW on the tensors that an order names, everything else frozen."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from fedalt.models.base import Base
from fedalt.training.checkpointing import checkpointing
from fedalt.training.group import Group, Share, Trained, Training, packs
from fedalt.training.orders import as_it_is

OnStep = Callable[[int, int, int, float], None]

# More tokens in a pass do not fit a CPU's caches, fewer leave a GPU idle. Fixed and not tried out
# at the start: which clients share a pass decides the last bits of a result.
_PASS_TOKENS = {"cpu": 1024}
_PASS_TOKENS_OF_A_GPU = 16384


def passes(base: Base, training: Training, steps: Mapping[str, float]) -> Iterator[list[str]]:
    """Groups of clients whose steps, of so many tokens each, are together about a pass."""
    most = training.pass_tokens if base.adapted.packs.longest else 0
    if most is None:
        most = usual_tokens(base)
    group: list[str] = []
    tokens = 0.0
    for client_id, step in steps.items():
        if group and tokens + step > most:
            yield group
            group, tokens = [], 0.0
        group.append(client_id)
        tokens += step
    if group:
        yield group


def usual_tokens(base: Base) -> int:
    """How many tokens of several clients go through the model at once where nothing says more."""
    return _PASS_TOKENS.get(base.adapted.device.type, _PASS_TOKENS_OF_A_GPU)


def fit_together(base: Base, first: Share, second: Share) -> bool:
    """Whether two clients can share their passes through the base model."""
    left, right = first.order, second.order
    return (
        all(packs(base, share.examples) for share in (first, second))
        and left.step is right.step is None
        and (left.penalty is None) == (right.penalty is None)
        and (left.compose is as_it_is) == (right.compose is as_it_is)
        and (left.plan, left.train, left.rate) == (right.plan, right.train, right.rate)
        and {name: tensor.shape for name, tensor in left.tree.items()}
        == {name: tensor.shape for name, tensor in right.tree.items()}
    )


def train_together(
    base: Base, shares: Sequence[Share], training: Training, on_step: OnStep | None = None
) -> list[Trained]:
    """Carry out the orders of clients that `fit_together`, a step of each in one pass.

    Every client takes the steps that it would take alone, to rounding: the order of its examples
    and its dropout masks depend on its seed, its gradients are clipped by themselves, its learning
    rate falls over its own steps, and when it has taken them the others go on. `on_step` hears
    which client it was, the number of its steps done, of all its steps, and the step's loss.
    """
    group = Group.of(base, shares, training)
    ended: dict[int, Trained] = {}
    done = 0
    # A step of its own may bind several trees before it goes back: a layer that runs again then
    # would meet the wrong one.
    plain = shares[0].order.step is None
    with checkpointing(base.adapted.model, training.gradient_checkpointing and plain):
        while group.clients:
            going = [at for at, client in enumerate(group.clients) if done < len(client.batches)]
            for at, client in enumerate(group.clients):
                if at not in going:
                    ended[client.index] = client.ended(group.tree(at), group.flat.moments(at))
            if len(going) < len(group.clients):
                group = group.only(going)
                continue
            losses, gradients = group.step(done)
            for client, loss in zip(group.clients, losses, strict=True):
                client.took(done, loss, training)
                if on_step is not None:
                    on_step(client.index, done + 1, len(client.batches), loss)
            group.descend(gradients, done)
            done += 1
    return [ended[at] for at in range(len(shares))]
