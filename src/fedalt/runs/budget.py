"""The ledger of a run's privacy: what it may spend, and what it has spent.

privacy.json lies beside progress.json and is replaced before each round: a round that was begun
counts, even if its process is killed, for nobody knows what has left it.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypedDict

from fedalt.core.files import atomic_write
from fedalt.core.noise import Randomness
from fedalt.core.reading import StoreError, read_sealed, sealed
from fedalt.core.settings import Training
from fedalt.core.upload_settings import Privacy
from fedalt.engine.accounting import Spent, epsilon, noise_for
from fedalt.engine.adaptive_clip import AdaptiveClip, clip_now
from fedalt.engine.members import Members
from fedalt.engine.privacy import PrivacyError, Protection, Release
from fedalt.engine.privacy_checks import Fits, fits_of
from fedalt.engine.states import States
from fedalt.methods.contract import AnyMethod
from fedalt.runs.folder import RunFolder
from fedalt.runs.settings import Settings
from fedalt.runs.setup import Prepared
from fedalt.training.batches import steps_per_epoch
from fedalt.training.clipping import rate

LEDGER: Final = "privacy.json"


class _Form(TypedDict):
    begun: int
    noise: dict[str, float]
    spent: dict[str, list[tuple[float, int]]]


@dataclass(frozen=True)
class RunBudget:
    """What a run may spend and has spent; see `engine.privacy.Budget`. Its ledger is in `folder`.

    `planned` are the noisy sums that each client takes part in over all rounds, `of_a_round` those
    of one. `least` is how many rounds have surely begun, `cohort` how many clients are in one at
    most.
    """

    folder: Path
    privacy: Privacy
    planned: Mapping[str, Spent]
    of_a_round: Mapping[str, Spent]
    fits: Fits | None = None
    least: int = 0
    cohort: int = 0

    def protection(self, norm: float | None = None) -> Protection:
        """What clients do, with the clip that rounds have come to if it is no fixed one."""
        if self.privacy.quantile is None:
            return Protection(self.privacy, self._noise, self.fits)
        return Protection(self.privacy, self._noise, norm=norm or self.privacy.clip)

    @property
    def begun(self) -> int:
        """How many rounds the ledger counts."""
        return self._read()["begun"]

    def begin(self, cohort: Iterable[str]) -> dict[str, object]:
        """Count a round in the ledger, if the budget allows it; what the record says of it."""
        ledger = self._read()
        spent = {who: Counter(dict(pairs)) for who, pairs in ledger["spent"].items()}
        for who in cohort:
            spent[who] = spent.get(who, Counter()) + Counter(self.of_a_round[who])
        after = max((self._epsilon(who, of) for who, of in spent.items()), default=0.0)
        limit, delta = self.privacy.epsilon, self.privacy.delta
        if limit is not None and after > limit * (1 + 1e-9):
            raise PrivacyError(
                f"the next round would spend epsilon {after:.3g}, but [privacy] allows {limit:g} "
                f"at delta {delta:g}; {ledger['begun']} rounds have begun, and those that were cut "
                "short count too; on one machine a run with fewer rounds in [rounds] ends here and "
                "is tested"
            )
        pairs = {who: sorted(of.items()) for who, of in spent.items()}
        content = {"begun": ledger["begun"] + 1, "noise": dict(self._noise), "spent": pairs}
        atomic_write(self.folder / LEDGER, sealed(content))
        noise = max(self._noise.values())
        finite = after if math.isfinite(after) else None
        return {"epsilon": finite, "delta": delta, "noise": noise}

    def release(self, method: AnyMethod, states: States, round_: int) -> Release | None:
        """The noise of a round's sum, where the server adds it."""
        if self.privacy.unit != "client":
            return None
        noise, clip = max(self._noise.values()), self.protection(clip_now(states)).clip
        adaptive = self._adaptive(clip, noise, round_)
        deviation = clip * (noise if adaptive is None else adaptive.sum_noise)
        randomness = Randomness(self.privacy.seed, "server", round_)
        return Release(states, deviation, randomness, not method.averages, adaptive)

    def _adaptive(self, clip: float, noise: float, round_: int) -> AdaptiveClip | None:
        if self.privacy.quantile is None:
            return None
        randomness = Randomness(self.privacy.seed, "clip", round_)
        return AdaptiveClip(self.privacy.quantile, clip, noise, self.cohort, randomness)

    @cached_property
    def _noise(self) -> Mapping[str, float]:
        """Every client's multiplier: as given, as before, or solved for the planned rounds.

        Where the server adds the noise it is the same for all.
        """
        if (self.folder / LEDGER).exists():
            return self._read()["noise"]
        if self.privacy.noise is not None:
            return dict.fromkeys(self.planned, self.privacy.noise)
        budget, delta = self.privacy.epsilon, self.privacy.delta
        assert budget is not None
        solved = {who: noise_for(spent, budget, delta) for who, spent in self.planned.items()}
        if self.privacy.unit == "client":
            return dict.fromkeys(solved, max(solved.values()))
        return solved

    def _epsilon(self, client_id: str, spent: Spent) -> float:
        return epsilon(spent, self._noise[client_id], self.privacy.delta)

    def _read(self) -> _Form:
        """The ledger. Raises StoreError where it is gone or tells of fewer rounds than were."""
        file = self.folder / LEDGER
        if not file.exists() and not self.least:
            return {"begun": 0, "noise": {}, "spent": {}}
        ledger: Any = read_sealed(file, _Form)
        if ledger["begun"] < self.least:
            raise StoreError(
                f"{file} counts {ledger['begun']} rounds, but {self.least} have counted: it is of "
                "an earlier time; put back the one that belongs to this folder"
            )
        return ledger  # type: ignore[no-any-return]


def budget_of(
    folder: Path,
    settings: Settings,
    members: Members,
    examples: Callable[[str], int],
    least: int,
    counted: Collection[str] = (),
) -> RunBudget | None:
    """The budget of these members' rounds, of which `least` have begun; None without privacy.

    `examples` says how many training examples a client has. `counted` are those whose ledger it
    is, all if none is named.
    """
    privacy, schedule = settings.privacy, settings.rounds
    if privacy.unit is None:
        return None
    fits = fits_of(settings.method, schedule.rounds) if privacy.unit == "example" else None
    cohorts = [schedule.cohort(members.at(at), at, settings.seed) for at in range(schedule.rounds)]
    of_a_round = {
        who: {1.0: 1} if fits is None else _sums(fits, settings.training, examples(who))
        for who in counted or members.clients
    }
    planned = {
        who: {
            probability: count * sum(who in cohort for cohort in cohorts)
            for probability, count in spent.items()
        }
        for who, spent in of_a_round.items()
    }
    most = max(map(len, cohorts))
    return RunBudget(folder, privacy, planned, of_a_round, fits, least, most)


def budget_of_run(prepared: Prepared, folder: RunFolder) -> RunBudget | None:
    """What a run may spend of privacy."""
    settings, task = prepared.parts.settings, prepared.task

    def examples(client_id: str) -> int:
        return task.training_size(client_id)[0]

    members = Members(task.clients, settings.clients)
    return budget_of(folder.path, settings, members, examples, folder.rounds_done())


def _sums(fits: Fits, training: Training, examples: int) -> Spent:
    """The noisy sums of a client's round of DP-SGD, by the probability of a text to be in one.

    Examples that are spared from training make both the probability and the steps other ones.
    """
    epochs = (
        training.local_epochs if fits.epochs is None else max(fits.epochs, training.local_epochs)
    )
    trained = examples - max(1, int(fits.spare * examples)) if fits.spare else examples
    steps = fits.count * epochs * steps_per_epoch(examples, training.batch_size)
    return {rate(max(trained, 1), training.batch_size): steps}
