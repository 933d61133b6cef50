"""`fedalt generate`: what a client's model answers, and the flags that name a client's model."""

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
    typer.Option(
        "--round",
        metavar="N",
        min=1,
        callback=lambda count: None if count is None else count - 1,  # states count from 0
        help="Use the model after the Nth round instead of the tested one.",
    ),
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


def _asked() -> Iterator[list[str]]:
    """All lines of a file or pipe at once; of a terminal one by one, as each wants an answer."""
    if not sys.stdin.isatty():
        yield [line for line in piped_lines() if line]
        return
    note("one question per line; an empty line ends")
    yield from ([text] for text in next_lines("> "))
