"""Differential privacy as a property of a round: what a client adds is bounded, the sum has noise.

unit = "client"    a client's upload moves by at most `clip` from where it would be had the client
                   not trained; the server adds noise to the sum of a round's uploads before the
                   method sees them. For a mean that start is the broadcast; for FedALT it is the
                   client's last accepted upload, so its total is
                       T_t = T_(t-1) + sum_k change_k + noise_t
                   With a `quantile` the clip follows what clients send (engine/adaptive_clip.py).
unit = "example"   the client trains by DP-SGD (training/clipping.py): what it sends has noise

McMahan, Ramage, Talwar, Zhang: "Learning Differentially Private Recurrent Language Models", arXiv
1710.06963. No method knows of any of this.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, Protocol

import torch
from torch import Tensor

from fedalt.adapters.initializer import Initializer
from fedalt.core.noise import Randomness
from fedalt.core.tree import Tree
from fedalt.core.upload_settings import Privacy as Privacy
from fedalt.engine.adaptive_clip import AdaptiveClip
from fedalt.engine.dry_run import play
from fedalt.engine.privacy_checks import Fits
from fedalt.engine.schedule import moment
from fedalt.engine.states import States
from fedalt.methods.contract import AnyMethod, Local, Message
from fedalt.training.clipping import Clipping
from fedalt.training.orders import Fit, Fitted

_MARGIN: Final = 1 - 1e-3  # float32 may round what is held to a little more


@dataclass(frozen=True)
class Protection:
    """What clients of an arm do for privacy.

    For DP-SGD `noise` are their multipliers, `fits` what of a round has been counted. `norm` is the
    clip that earlier rounds have come to, where it follows what clients send.
    """

    privacy: Privacy
    noise: Mapping[str, float] = field(default_factory=dict)
    fits: Fits | None = None
    norm: float | None = None

    def local(
        self,
        method: AnyMethod,
        client: Any,
        sent: Message,
        init: Initializer,
        tell: Callable[[bool], None],
    ) -> Local[Any]:
        """A client's half of a round, its upload bounded if clients are what is protected.

        It `tell`s then whether that left the upload as it was.
        """
        steps = method.local(client, sent)
        if self.privacy.unit != "client":
            return steps
        _, untrained = play(method.local(client, sent), init, examples=1)
        return _held_back(steps, untrained.tree, self.clip, tell)

    def clipping(self, client_id: str, when: int | str, number: int, fit: Fit) -> Clipping | None:
        """How the fit of this number trains that a client orders in a round; None: plainly."""
        if self.privacy.unit != "example":
            return None
        if not (self.fits and self.fits.count_in(number, fit)):
            raise PrivacyError(
                f"client {client_id!r}, {moment(when)}: the method orders more training than has "
                "been counted for the privacy of its examples"
            )
        randomness = Randomness(self.privacy.seed, client_id, when, number)
        return Clipping(self.clip, self.noise[client_id], randomness)

    @property
    def clip(self) -> float:
        """The largest norm."""
        clip = self.privacy.clip if self.norm is None else self.norm
        assert clip is not None
        return clip


class Budget(Protocol):
    """What a run may spend, what it has spent, and the noise that follows from it."""

    def protection(self, norm: float | None = None) -> Protection:
        """What clients do, with the clip that rounds have come to if it is no fixed one."""

    def begin(self, cohort: Iterable[str]) -> dict[str, object]:
        """Count a round before it begins, and say what is spent with it, for the record.

        Raises PrivacyError for a round that would exceed the budget.
        """

    def release(self, method: AnyMethod, states: States, round_: int) -> "Release | None":
        """The noise of a round's sum; None where clients add their own."""


class PrivacyError(ValueError):
    """A round that may not begin, and why."""


@dataclass(frozen=True)
class CarriedNoise:
    """The noise that is in a client's entry of a total, which is the sum of all latest uploads."""

    TAG: ClassVar = "carried-noise"

    tree: Tree = field(default_factory=dict)


@dataclass
class Release:
    """The noise of a round: added to one upload, and thereby to the sum of all.

    A mean takes it up. Of a total of everybody's latest uploads it would go with the client's next
    one, and the same change would be released twice, with other noise: so the client's entry
    `carries` it on. `adaptive` is the round's clip, if the next one follows from it.
    """

    states: States
    deviation: float
    randomness: Randomness
    carries: bool
    adaptive: AdaptiveClip | None = None
    _after: dict[str, CarriedNoise] = field(default_factory=dict)

    def noised(
        self, clients: Iterable[str], uploads: Iterable[tuple[str, Message]]
    ) -> Iterator[tuple[str, Message]]:
        """The uploads of these clients, the first that holds anything with the noise of all."""
        carried = {client_id: self._carried(client_id) for client_id in clients}
        self._after = {who: CarriedNoise() for who, noise in carried.items() if noise.tree}
        drawn = False
        for client_id, upload in uploads:
            if drawn or not upload.tree:
                yield client_id, upload
                continue
            drawn = True
            noise = {name: self._draw(tensor) for name, tensor in sorted(upload.tree.items())}
            for entry in carried.values():
                for name, tensor in entry.tree.items():
                    noise[name] += tensor
            whole = {
                name: (tensor + noise[name]).to(tensor) for name, tensor in upload.tree.items()
            }
            if self.carries:
                kept = {name: tensor.float() for name, tensor in noise.items()}
                self._after[client_id] = CarriedNoise(kept)
            yield client_id, replace(upload, tree=whole)

    @property
    def clip(self) -> float | None:
        """The round's clip, where it is no fixed one."""
        return None if self.adaptive is None else self.adaptive.norm

    def settle(self, within: Sequence[bool] = ()) -> None:
        """Remember which client's entry carries what, and the clip of the next round.

        `within`: of each accepted upload, whether it was within the clip.
        """
        for client_id, noise in self._after.items():
            self.states.put(f"noise/{client_id}", noise)
        if self.adaptive is not None:
            self.adaptive.settle(self.states, within)

    def _carried(self, client_id: str) -> CarriedNoise:
        kept = self.states.get(f"noise/{client_id}", CarriedNoise) if self.carries else None
        return kept or CarriedNoise()

    def _draw(self, like: Tensor) -> Tensor:
        return self.randomness.normal(like.numel()).view(like.shape) * self.deviation


def _held_back(
    steps: Local[Any], before: Tree, clip: float, tell: Callable[[bool], None]
) -> Local[Any]:
    """The same, all training answered with a tree whose uploaded part has moved by `clip` at most.

    So the client goes on from what it has uploaded, and what it subtracts later is that.
    """
    answer: Any = None
    within = True
    while True:
        try:
            order = steps.send(answer)
        except StopIteration as end:
            state, upload = end.value
            # A second time for what is made of the trained tensors, or comes of several fits.
            held = hold_back(upload.tree, before, clip)
            tell(within and held is upload.tree)
            return state, replace(upload, tree=held)
        answer = yield order
        if isinstance(answer, Fitted):
            held = hold_back(answer.tree, before, clip)
            within = within and held is answer.tree
            answer = replace(answer, tree=held)


def hold_back(tree: Tree, before: Tree, clip: float) -> Tree:
    """The tree with what it shares with `before` moved from there by a norm of at most `clip`."""
    moved = {name: tree[name].double() - before[name] for name in tree.keys() & before.keys()}
    norm = math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in moved.values()))
    if norm <= clip:
        return tree
    factor = clip * _MARGIN / norm
    near = {name: (before[name] + tensor * factor).to(tree[name]) for name, tensor in moved.items()}
    return {**tree, **near}
