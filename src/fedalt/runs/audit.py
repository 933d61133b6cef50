"""An audit of what [privacy] promises: texts are planted, and a finished run is asked for them.

A client's training data hold each of CANARIES texts, random words with a random answer, if a fair
coin says so. The run is a federation of two clients by DP-SGD, from the settings to the ledger
like any other. Whoever attacks knows all texts and the base model, and sees the client's own
model; the sign of training is how far a text's loss has fallen. Batches are all of a client's
data: how likely a text is drawn then does not tell how many there are, and the claim is exact.
"""

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedalt.core.seeds import seed_of
from fedalt.data.suite import KINDS, LOOKS, NAMES, OTHER_WORDS, THINGS, generate
from fedalt.engine.audit import Guesses, guess
from fedalt.engine.client_work import servings
from fedalt.runs.lifecycle import serving, start_run
from fedalt.runs.observer import Observer
from fedalt.runs.settings import settings_of
from fedalt.runs.setup import Prepared, prepare, trainer_of

CANARIES: Final = 96
DELTA: Final = 1e-5
_AUDITED: Final = "audited"
_OTHERS: Final = 8  # ordinary examples of either client
_ROUNDS, _EPOCHS, _LR, _CLIP = 4, 8, 1e-2, 1.0
_WORDS: Final = (*NAMES, *LOOKS, *KINDS, *OTHER_WORDS, *sum(map(tuple, THINGS.values()), ()))

Watch = Callable[[Prepared], AbstractContextManager[Observer]]


@dataclass(frozen=True)
class Audit:
    """What a run claimed, infinite without noise, and what the attack shows of it."""

    claimed: float
    guesses: Guesses

    @property
    def kept(self) -> bool:
        """Whether the claim is consistent with what was found."""
        return self.guesses.bound <= self.claimed


def audit(epsilon: float | None, seed: int, watch: Watch, *, repeatable: bool = False) -> Audit:
    """Plant, train for this budget or without noise, and attack.

    `seed` draws texts, coins and the run; with `repeatable` the noise, too.
    """
    stream = random.Random(seed_of(seed, "audit"))
    canaries = [_canary(stream) for _ in range(CANARIES)]
    coins = [stream.random() < 0.5 for _ in canaries]
    budget = {"noise": 0.0} if epsilon is None else {"epsilon": epsilon}
    privacy = {**budget, **({"seed": seed} if repeatable else {})}
    with tempfile.TemporaryDirectory(prefix="fedalt-audit-") as name:
        data, run = Path(name) / "data", Path(name) / "run"
        _write(data, canaries, coins, seed)
        prepared = prepare(settings_of(_settings(data, privacy, seed), "the audit"))
        with watch(prepared) as observer:
            folder = start_run(prepared, run, observer)
        claimed = [line["epsilon"] for line in folder.lines() if line["kind"] == "round"][-1]
        signs = _falls(prepared, run)
    return Audit(math.inf if claimed is None else claimed, guess(signs, coins, DELTA))


def _falls(prepared: Prepared, run: Path) -> list[float]:
    """How far the loss of each canary has fallen from the base model to the client's own."""
    method, init = prepared.parts.settings.method, prepared.parts.init
    client, message = (
        method.init_client(init, _AUDITED),
        method.broadcast(method.init_server(init), _AUDITED),
    )
    before, _ = servings(method, client, message, _AUDITED, lambda _: [])
    after = serving(prepared.parts, run, _AUDITED, "own")
    trainer = trainer_of(prepared)
    canaries = trainer.task.examples(_AUDITED, "test")
    scores = trainer.score([(before, canaries), (after, canaries)], generate=False)
    first, last = (score.losses for score in scores)
    return [one - other for one, other in zip(first, last, strict=True)]


def _canary(stream: random.Random) -> dict[str, str]:
    return {"instruction": " ".join(stream.sample(_WORDS, 4)), "output": stream.choice(_WORDS)}


def _write(
    data: Path, canaries: Sequence[Mapping[str, str]], coins: Sequence[bool], seed: int
) -> None:
    """Both clients' files; all canaries are test data, by which the attack reads them."""
    data.mkdir()
    planted = [canary for canary, coin in zip(canaries, coins, strict=True) if coin]
    for client, task, more in ((_AUDITED, "reading", planted), ("other", "inference", [])):
        suite: Any = generate(task, seed=seed, train=_OTHERS, validation=2, test=0)
        splits: dict[str, Sequence[Any]] = {**suite, "train": [*suite["train"], *more]}
        splits["test"] = canaries if client == _AUDITED else []
        for split, records in splits.items():
            if records:
                (data / f"{client}.{split}.jsonl").write_text(_lines(records), encoding="utf-8")


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


def _settings(data: Path, privacy: Mapping[str, float], seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "local_baseline": False,
        "data": {"path": str(data)},
        "method": {"name": "fedalt"},
        "training": {"lr": _LR, "local_epochs": _EPOCHS, "batch_size": CANARIES + _OTHERS},
        "rounds": {
            "rounds": _ROUNDS,
            "select": "last",
            "test": False,
            "evaluate_every": _ROUNDS,
        },
        "privacy": {"unit": "example", "clip": _CLIP, "delta": DELTA, **privacy},
    }
