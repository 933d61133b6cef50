"""Training as a user sees it: what begins, signs of life, and a way back where it stops."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from fedalt.cli.output import note, warn
from fedalt.cli.progress import watching
from fedalt.report.trackers import TrackerName, tracking
from fedalt.runs.folder import StoreError, open_run
from fedalt.runs.lifecycle import resume_run
from fedalt.runs.observer import Observers
from fedalt.runs.settings import lora_of, method_name
from fedalt.runs.setup import Prepared, base_arm
from fedalt.training.group import TrainingError


def introduce(prepared: Prepared, out: Path, advice: str = "", *, quiet: bool = False) -> None:
    """What is about to run, and what the user should know of it.

    `advice` tells which settings are the base model's own.
    """
    settings, base = prepared.parts.settings, prepared.parts.base
    clients, rounds = len(prepared.task.clients), settings.rounds.rounds
    numbers = base.adapted.model.num_parameters()
    note(
        f"{method_name(settings.method)}, rank {lora_of(settings.method).rank}, on "
        f"{len(base.adapted.sites)} layers of {base.name} ({numbers / 1e6:.1f} M parameters, "
        f"{base.adapted.device}); {clients} {'client' if clients == 1 else 'clients'}, "
        f"{rounds} {'round' if rounds == 1 else 'rounds'}, seed {settings.seed}; in {out}",
        quiet=quiet,
    )
    if advice:
        note(advice, quiet=quiet)
    packs = base.adapted.packs
    note(
        "texts are packed, clients share passes through the model"
        if packs.longest
        else f"texts are padded, one client after the other: {packs.why_not}",
        quiet=quiet,
    )
    if settings.rounds.test and settings.scoring.base and base_arm(prepared.parts) is None:
        note("no column base: the classifier's head begins with random numbers", quiet=quiet)
    warn(prepared.warnings, quiet=quiet)


def train(
    prepared: Prepared,
    path: Path,
    *,
    report_to: Sequence[TrackerName] = (),
    quiet: bool = False,
) -> None:
    """Go on to the end, with signs of life and, where it is stopped, a way back."""
    folder = open_run(path)
    done = folder.rounds_done()
    processes = prepared.parts.settings.training.processes
    if processes > 1:
        note(f"{processes} processes share the clients of a round", quiet=quiet)
    with (
        _way_back(path, prepared.parts.settings.rounds.rounds),
        tracking(path, report_to, folder.lines()) as trackers,
        watching(prepared, done=done, quiet=quiet) as watcher,
    ):
        resume_run(prepared, path, Observers([*trackers, watcher]))


@contextmanager
def _way_back(path: Path, rounds: int) -> Iterator[None]:
    """Tell where a stopped run stands; nothing of the rounds before is lost."""

    def where() -> str:
        done = open_run(path).rounds_done()
        return f"round {done + 1}/{rounds}" if done < rounds else "the test after the last round"

    try:
        yield
    except KeyboardInterrupt:
        note(f"stopped in {where()}; `fedalt resume {path}` continues")
        raise typer.Exit(130) from None
    except StoreError:  # the run has not gone on at all
        raise
    except TrainingError:
        file = path / "settings.toml"
        note(
            f"stopped in {where()}; change {file}, then `fedalt resume {path}` continues, unless a "
            "model diverged in a round that is done: then start another run"
        )
        raise
    except Exception:
        note(f"stopped in {where()}; `fedalt resume {path}` repeats that and continues")
        raise
