"""`fedalt data check`, `split` and `suite`: look at client data, and make some."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedalt.cli.output import console, hush_libraries, note, show_json, tell, warn
from fedalt.core.foreign import shown, shown_lines
from fedalt.report.docstrings import docstring

if TYPE_CHECKING:
    from fedalt.data.data_report import ClientReport, DataReport

app = typer.Typer(help="Check client data, or make client folders.", suggest_commands=False)

_CLIENT = typer.Option(help="Column that names the client.", show_default=False)
_PROMPT = typer.Option(help="Column with the prompt.", show_default=False)
_ANSWER = typer.Option(help="Column with the answer.", show_default=False)


@app.callback()
def _group() -> None:
    """Client data."""


def check(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Folder or file of client data.")],
    model: Annotated[str, typer.Option(help="Base model whose tokenizer counts.")] = "tiny",
    max_length: Annotated[int, typer.Option(help="Longest example, in tokens.")] = 512,
    template: Annotated[
        Path | None, typer.Option(help="File with a prompt template.", show_default=False)
    ] = None,
    client_column: Annotated[str | None, _CLIENT] = None,
    prompt_column: Annotated[str | None, _PROMPT] = None,
    answer_column: Annotated[str | None, _ANSWER] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Also write an HTML report.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Measure every client's data and warn of problems.

    A folder that cannot be used is one error that lists all problems.
    """
    if html:
        from fedalt.report.page import require_report

        require_report()
    hush_libraries()
    from fedalt.data.doctor import check as examine
    from fedalt.data.folder import open_data
    from fedalt.data.prompts import read_template
    from fedalt.data.records import Columns
    from fedalt.models.base import load_tokenizer, require_tokenizer_fits

    folder = open_data(path, Columns(client_column, prompt_column, answer_column))
    form, tokenizer = read_template(template), load_tokenizer(model)
    require_tokenizer_fits(tokenizer, model)
    report = examine(folder, tokenizer, form, max_length)
    if html:
        from fedalt.report.data_page import data_page
        from fedalt.report.page import write_page

        write_page(data_page(report, model), html)
    if as_json:
        show_json(asdict(report))
        return
    _show(report, model)


def split(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="Records or a table.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    by: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="One client per value of this field."),
    ] = None,
    dirichlet: Annotated[
        float | None,
        typer.Option(metavar="ALPHA", help="Draw shares of each label; small: very different."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Label field that --dirichlet divides.")
    ] = None,
    clients: Annotated[
        int | None, typer.Option(metavar="N", help="Number of clients of --dirichlet.")
    ] = None,
    equal: Annotated[
        int | None, typer.Option(metavar="N", help="N clients with random parts of equal size.")
    ] = None,
    test_fraction: Annotated[
        float, typer.Option(help="Share of each client's records for its test file.")
    ] = 0.2,
    minimum: Annotated[int, typer.Option(help="Fewest records of a client of --dirichlet.")] = 10,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    prompt_column: Annotated[str | None, _PROMPT] = None,
    answer_column: Annotated[str | None, _ANSWER] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Split one file into client data with --by, --dirichlet or --equal."""
    from fedalt.data.partition import Partition, divide
    from fedalt.data.records import Columns

    if sum(way is not None for way in (by, dirichlet, equal)) != 1:
        raise typer.BadParameter("give one of --by, --dirichlet and --equal")
    if dirichlet is None and (label is not None or clients is not None):
        raise typer.BadParameter("--label and --clients say how --dirichlet divides; it is missing")
    common: dict[str, Any] = {"test": test_fraction, "minimum": minimum, "seed": seed}
    if by is not None:
        wanted = Partition(by="column", column=by, **common)
    elif equal is not None:
        wanted = Partition(by="equal", clients=equal, **common)
    else:
        if label is None or clients is None or dirichlet is None:
            raise typer.BadParameter("--dirichlet needs --label FIELD and --clients N")
        wanted = Partition(by="dirichlet", column=label, clients=clients, alpha=dirichlet, **common)
    divided = divide(source, out, wanted, Columns(None, prompt_column, answer_column))
    if as_json:
        show_json(asdict(divided))
        return
    for client, counts in divided.counts.items():
        tell(f"{client}: {counts['train']} train, {counts['test']} test")
    if divided.moved:
        note(f"{divided.moved} records were moved so that every client has at least {minimum}")
    note(f"{len(divided.counts)} clients in {out}")


def suite(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    clients: Annotated[int, typer.Option(min=1, help="Clients of each of the eight tasks.")] = 1,
    train: Annotated[int, typer.Option(min=1, help="Training examples of a client.")] = 96,
    validation: Annotated[int, typer.Option(min=0, help="Validation examples.")] = 40,
    test: Annotated[int, typer.Option(min=0, help="Test examples.")] = 160,
) -> None:
    """Write the built-in tasks as a folder of client data."""
    hush_libraries()
    from fedalt.data.suite import write_suite

    sizes = {"train": train, "validation": validation, "test": test}
    write_suite(out, seed=seed, clients_per_task=clients, **sizes)
    note(f"{8 * clients} clients in {out}")


for command in (check, split, suite):
    app.command(help=docstring(command))(command)


def _show(report: "DataReport", model: str) -> None:
    """The report as a table, one example with its masked part, and the warnings."""
    from rich.text import Text

    from fedalt.report.sheet import Sheet

    heads = (
        "client",
        "split",
        "records",
        "tokens",
        "95 %",
        "longest",
        "cut",
        "answers",
        "repeated",
        "balance",
    )
    rows: list[list[str]] = []
    breaks = []
    for client in report.clients:
        breaks.append(len(rows))
        rows += _rows(client)
    title = f"{report.path}, as the tokenizer of {model} sees it"
    out = console()
    out.print(Sheet(heads, rows, title, left=(0, 1, 9), folded=(9,), breaks=breaks[1:]))
    masked, answer = report.example
    out.print(f"the first train example of {shown(report.example_client)}:")
    for sign, style, part in ((".", "dim", masked), (">", "bold green", answer)):
        for line in shown_lines(part).splitlines():
            out.print(Text(f"  {sign} {line}", style), soft_wrap=True)
    out.print("  . is masked, > is the answer, which alone the loss is on\n")
    warn(report.warnings)
    if not report.warnings:
        note("nothing to warn of")


def _rows(client: "ClientReport") -> list[list[str]]:
    """A row for each split; the client's name is in the first."""
    rows: list[list[str]] = []
    for name, split_ in client.splits.items():
        balance = ", ".join(f"{shown(key)}: {n}" for key, n in split_.balance.items())
        row = [
            client.client_id if not rows else "",
            name,
            f"{split_.records}",
            f"{split_.tokens.mean:.0f}",
            f"{split_.tokens.p95}",
            f"{split_.tokens.longest}",
            f"{split_.truncated_prompts}",
            f"{split_.answer_share:.0%}",
            f"{split_.duplicates}",
            balance if len(balance) <= 60 else f"{len(split_.balance)} different",
        ]
        rows.append(row)
    return rows
