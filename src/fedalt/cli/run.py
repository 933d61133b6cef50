"""`fedalt run`: train in a new folder, by a file of settings, by flags, or by both."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedalt.cli.flags import AsJson, Quiet, ReportTo
from fedalt.cli.output import free_folder, hush_libraries, show_run

DATA, METHOD, TRAINING = "Data and model", "Method", "Training"
SCORING, OUTPUT = "Scoring", "Output"


def _option(help_: str, panel: str, name: str, default: str = "") -> Any:
    """A flag; what it is by default is told here, so that `None` can say that it was not given."""
    return typer.Option(name, help=help_, rich_help_panel=panel, show_default=default or False)


def run(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG.toml]", help="Settings; flags override what it says."),
    ] = None,
    data: Annotated[str | None, _option("Folder or file of client data.", DATA, "--data")] = None,
    client_field: Annotated[
        str | None, _option("Client column of a single data file.", DATA, "--client-field")
    ] = None,
    template: Annotated[
        str | None, _option("File with a prompt template.", DATA, "--template")
    ] = None,
    max_length: Annotated[
        int | None, _option("Most tokens of an example.", DATA, "--max-length", "512")
    ] = None,
    cut_answers: Annotated[
        bool | None,
        _option("Cut answers that are longer than that.", DATA, "--cut-answers"),
    ] = None,
    validation: Annotated[
        float | None,
        _option("Share of train held out without a validation file.", DATA, "--validation", "0.1"),
    ] = None,
    model: Annotated[
        str | None, _option("Base model: folder, hub id or 'tiny'.", DATA, "--model", "tiny")
    ] = None,
    targets: Annotated[
        str | None,
        _option(
            "Layers to adapt: 'all-linear', 'default', or names with commas.", DATA, "--targets"
        ),
    ] = None,
    quantise: Annotated[
        str | None, _option("Load the base model in '8bit' or '4bit'.", DATA, "--quantise")
    ] = None,
    device: Annotated[
        str | None, _option("Where to compute, such as 'cpu' or 'cuda'.", DATA, "--device")
    ] = None,
    method: Annotated[
        str | None, _option("See `fedalt methods`.", METHOD, "--method", "fedalt")
    ] = None,
    rank: Annotated[int | None, _option("Rank of the adapters.", METHOD, "--rank", "8")] = None,
    alpha: Annotated[
        float | None,
        _option("Their output is scaled by alpha / rank.", METHOD, "--alpha", "32, tiny: 128"),
    ] = None,
    dropout: Annotated[
        float | None, _option("Dropout before the adapters.", METHOD, "--dropout", "0.05")
    ] = None,
    yardstick: Annotated[
        bool | None,
        _option("Also train every client alone.", METHOD, "--yardstick/--no-yardstick", "yes"),
    ] = None,
    rounds: Annotated[int | None, _option("Rounds.", TRAINING, "--rounds", "20, tiny: 10")] = None,
    local_epochs: Annotated[
        int | None, _option("Passes over its data per round.", TRAINING, "--local-epochs", "1")
    ] = None,
    participation: Annotated[
        float | None, _option("Share of the clients per round.", TRAINING, "--participation", "1")
    ] = None,
    lr: Annotated[
        float | None,
        _option("Learning rate at a round's start.", TRAINING, "--lr", "3e-4, tiny: 5e-4"),
    ] = None,
    batch_size: Annotated[
        int | None, _option("Examples per step.", TRAINING, "--batch-size", "8")
    ] = None,
    weight_decay: Annotated[
        float | None, _option("AdamW's weight decay.", TRAINING, "--weight-decay", "0.05")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        _option("Less memory, more time.", TRAINING, "--gradient-checkpointing"),
    ] = None,
    processes: Annotated[
        int | None,
        _option("Worker processes: one per GPU, or sharing the CPU.", TRAINING, "--processes", "1"),
    ] = None,
    seed: Annotated[int | None, _option("Of all random numbers.", TRAINING, "--seed", "0")] = None,
    evaluate_every: Annotated[
        int | None, _option("Rounds between validations.", SCORING, "--evaluate-every", "1")
    ] = None,
    select: Annotated[
        str | None, _option("Round to test: 'best' or 'last'.", SCORING, "--select", "best")
    ] = None,
    test: Annotated[
        bool | None,
        _option("Score the test data after the last round.", SCORING, "--test/--no-test", "yes"),
    ] = None,
    eval_batch_size: Annotated[
        int | None, _option("Examples scored at once.", SCORING, "--eval-batch-size", "32")
    ] = None,
    generate: Annotated[
        bool | None,
        _option("Write answers to the test data.", SCORING, "--generate/--no-generate", "yes"),
    ] = None,
    beams: Annotated[
        int | None, _option("Beams to write answers with.", SCORING, "--beams", "1")
    ] = None,
    max_new_tokens: Annotated[
        int | None, _option("Most tokens of an answer.", SCORING, "--max-new-tokens", "80")
    ] = None,
    out: Annotated[
        Path | None, _option("The run's folder.", OUTPUT, "--out", "runs/METHOD")
    ] = None,
    report_to: ReportTo = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train one better model per client, beside the yardstick of training alone.

    All settings come from CONFIG.toml, from flags, or from both; flags win. RUN/settings.toml
    keeps them all. What neither says is, with the built-in base model, as that one recommends.
    """
    hush_libraries()
    from fedalt.cli.training import introduce, train
    from fedalt.report.trackers import require_trackers
    from fedalt.runs.folder import require_unused
    from fedalt.runs.lifecycle import new_run
    from fedalt.runs.settings import advised_settings, method_name
    from fedalt.runs.setup import prepare

    flags: dict[str, Any] = {
        "seed": seed,
        "yardstick": yardstick,
        "data": {
            "path": data,
            "client_field": client_field,
            "template": template,
            "max_length": max_length,
            "cut_answers": cut_answers,
            "validation": validation,
        },
        "model": {
            "name": model,
            "targets": _names(targets),
            "quantise": quantise,
            "device": device,
        },
        "method": {"name": method, "rank": rank, "alpha": alpha, "dropout": dropout},
        "training": {
            "lr": lr,
            "batch_size": batch_size,
            "local_epochs": local_epochs,
            "weight_decay": weight_decay,
            "gradient_checkpointing": gradient_checkpointing,
            "processes": processes,
        },
        "rounds": {
            "rounds": rounds,
            "participation": participation,
            "evaluate_every": evaluate_every,
            "select": select,
            "test": test,
        },
        "scoring": {
            "batch_size": eval_batch_size,
            "generate": generate,
            "beams": beams,
            "max_new_tokens": max_new_tokens,
        },
    }
    settings, advice = advised_settings(config, _given(flags))
    out = out or free_folder(Path("runs") / method_name(settings.method))
    require_unused(out)
    require_trackers(report_to or ())
    prepared = prepare(settings)
    introduce(prepared, out, advice, quiet=quiet)
    new_run(prepared, out)
    train(prepared, out, report_to=report_to or (), quiet=quiet)
    split = "test" if settings.rounds.test else "validation"
    show_run(out, split=split, as_json=as_json, quiet=quiet)


def _names(text: str | None) -> list[str] | str | None:
    """Layers as a flag names them."""
    if text is None or text in ("all-linear", "default"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, sections without any left out."""
    given = {
        key: _given(value) if isinstance(value, dict) else value for key, value in flags.items()
    }
    return {key: value for key, value in given.items() if value is not None and value != {}}
