"""`fedalt export`: a client's model as a folder for other tools, or all clients' models."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedalt.cli.client import AsColumn, ClientId, Model, Round
from fedalt.cli.output import hush_libraries, note

if TYPE_CHECKING:
    from fedalt.data.examples import Example
    from fedalt.runs.answers import Served

Format = Literal["fedalt", "peft", "merged", "gguf", "individual"]
_KNOWN = 64  # training examples that the mean weights of adapters come from


def export(
    path: Model,
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="fedalt: the whole model, for `fedalt.load`, `fedalt serve`, and PEFT with "
            "fedalt. peft: one LoRA, for PEFT alone. merged: base model and adapters in one. "
            "gguf: one LoRA for llama.cpp. individual: the individual adapter alone, as a LoRA.",
        ),
    ] = "fedalt",
    client: ClientId = None,
    every: Annotated[
        bool, typer.Option("--all", help="All clients, a folder below --out for each.")
    ] = False,
    column: AsColumn = "own",
    round_: Round = None,
) -> None:
    """Write a client's model as a folder that transformers and PEFT load.

    Where a mixer or router weighs the adapters, peft and merged have their mean weights instead;
    what that costs is measured and told.
    """
    hush_libraries()
    from fedalt.flower.client_model import clients_of, served

    if every and client is not None:
        raise typer.BadParameter("--all writes every client; --client names one")
    base = None
    for name in clients_of(path) if every else [client]:
        of = served(path, name, column, round_, base)
        base, name = of.parts.base, name or clients_of(path)[0]
        folder = out / name if every else out
        _write(format_, path, name, of, folder)
        note(f"{folder / 'README.md'} shows how to load and prompt it")
        typer.echo(str(folder))


def _write(format_: Format, path: Path, client: str, of: "Served", folder: Path) -> None:
    """Write the folder, and say what is worth knowing of it."""
    from dataclasses import replace

    from fedalt.adapters.plan import Mixer, Router
    from fedalt.export.card import asked_as, card
    from fedalt.export.fixed import with_fixed_weights
    from fedalt.export.folders import export_individual, export_personal, require_free
    from fedalt.export.llama_cpp import export_gguf, require_gguf
    from fedalt.export.merged import export_merged, require_mergeable

    base = of.parts.base
    # Before the cost of fixed weights is measured, which takes long.
    require_free(folder)
    if format_ == "merged":
        require_mergeable(base)
    if format_ == "gguf":
        require_gguf(base)
    if format_ == "fedalt":
        readme = card(of, client, format_)
        export_personal(of.serving, base, folder, readme=readme, asked=asked_as(of))
        return
    if format_ == "individual":
        export_individual(of.serving, base, folder, readme=card(of, client, format_))
        return
    weighed = isinstance(of.serving.plan.combine, Mixer | Router)
    known, held_out = _examples(path, client, of) if weighed else ((), ())
    fixed = with_fixed_weights(of.serving, base, known, held_out)
    if fixed.note:
        note(f"note: {client}: {fixed.note}")
    readme = card(replace(of, serving=fixed.serving), client, format_, fixed.note)
    writers = {"merged": export_merged, "gguf": export_gguf, "peft": export_individual}
    writers[format_](fixed.serving, base, folder, readme=readme)


def _examples(
    path: Path, client: str, of: "Served"
) -> "tuple[Sequence[Example], Sequence[Example]]":
    """Some of the client's training examples, and those held out for validation."""
    from fedalt.flower.client_model import client_at, prepare_own
    from fedalt.runs.lifecycle import reopen_for

    base, config = of.parts.base, client_at(path)
    if config is None:
        task = reopen_for(path, client, base).task
    else:
        task = prepare_own(config, of.parts).task
    return task.examples(client, "train")[:_KNOWN], task.examples(client, "validation")
