"""`fedalt generate` and `export`: what one client gets out of a run."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedalt.cli.output import hush_libraries, note, tell
from fedalt.cli.typed import next_lines, piped_lines

ClientId = Annotated[
    str | None,
    typer.Option(
        "--client", metavar="ID", help="A client of the run; not needed for a client.toml."
    ),
]
Model = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="The folder of a run, or a federation's client.toml."),
]
Round = Annotated[
    int | None,
    typer.Option("--round", help="Use the model after this round instead of the tested one."),
]
AsColumn = Annotated[
    Literal["own", "shared", "local"],
    typer.Option(help="The client's own model, the shared part, or training alone."),
]


def generate(
    path: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; without it, every line of stdin is one."),
    ] = None,
    client: ClientId = None,
    column: AsColumn = "own",
    round_: Round = None,
    beams: Annotated[int | None, typer.Option(help="Beams, instead of the run's.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens, instead of the run's.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per answer.")
    ] = False,
) -> None:
    """Generate answers with a client's model to a prompt, or to every line of stdin.

    A prompt takes the form of the client's records; where those are instructions, it goes through
    the run's template.
    """
    hush_libraries()
    import json
    from dataclasses import replace

    from fedalt.flower.client_model import served
    from fedalt.runs.answers import answers

    of = served(path, client, column, round_)
    scoring = of.parts.settings.scoring
    if beams is not None:
        scoring = replace(scoring, beams=beams)
    if max_new_tokens is not None:
        scoring = replace(scoring, max_new_tokens=max_new_tokens)
    for asked in [[prompt]] if prompt is not None else _asked():
        for text, answer in zip(asked, answers(of, asked, scoring), strict=True):
            if as_json:
                typer.echo(json.dumps({"prompt": text, "answer": answer}))
            else:
                tell(answer)


def export(
    path: Model,
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    what: Annotated[
        Literal["personal", "individual"],
        typer.Option(
            help="The whole personalised model, for `fedalt.load` and PEFT with fedalt, or the "
            "client's individual adapter as a LoRA, for PEFT alone."
        ),
    ] = "personal",
    client: ClientId = None,
    column: AsColumn = "own",
    round_: Round = None,
) -> None:
    """Write a client's model as a folder that transformers and PEFT load."""
    hush_libraries()
    from fedalt.export.card import asked_as, card
    from fedalt.export.folders import export_individual, export_personal
    from fedalt.flower.client_model import clients_of, served

    of = served(path, client, column, round_)
    readme = card(of, client or clients_of(path)[0], what)
    if what == "personal":
        export_personal(of.serving, of.parts.base, out, readme=readme, asked=asked_as(of))
        note(f"`fedalt.load({str(out)!r})` loads it in Python")
    else:
        export_individual(of.serving, of.parts.base, out, readme=readme)
        note(f"`peft.PeftModel.from_pretrained(base, {str(out)!r})` loads it in Python")
    note(f"{out / 'README.md'} shows how to prompt it")
    typer.echo(str(out))


def _asked() -> Iterator[list[str]]:
    """All lines of a file or pipe at once; of a terminal one by one, as each wants an answer."""
    if not sys.stdin.isatty():
        yield [line for line in piped_lines() if line]
        return
    note("one question per line; an empty line ends")
    yield from ([text] for text in next_lines("> "))
