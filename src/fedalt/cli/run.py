"""`fedalt run`: train in a new folder, by a file of settings, by flags, or by both."""

from pathlib import Path
from typing import Annotated

import typer

from fedalt.cli.flags import AsJson, Quiet, ReportTo, given
from fedalt.cli.output import free_folder, hush_libraries, show_run


def run(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG.toml]", help="Settings; flags override what it says."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The folder of the run.",
            rich_help_panel="Output",
            show_default="runs/METHOD",
        ),
    ] = None,
    report_to: ReportTo = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train one better model per client, beside a local-only baseline.

    Settings come from CONFIG.toml, from flags, or from both; flags win. Whatever neither gives is
    as the built-in base model recommends, if that is used. RUN/settings.toml keeps all settings.
    """
    hush_libraries()
    from fedalt.cli.training import introduce, train
    from fedalt.report.trackers import require_trackers
    from fedalt.runs.beginning import require_unused
    from fedalt.runs.lifecycle import new_run
    from fedalt.runs.settings import advised_settings, method_name, to_toml
    from fedalt.runs.setup import prepare

    settings, advice = advised_settings(config, given(context))
    out = out or free_folder(Path("runs") / method_name(settings.method))
    require_unused(out, to_toml(settings))
    require_trackers(report_to or ())
    prepared = prepare(settings)
    introduce(prepared, out, advice, quiet=quiet)
    new_run(prepared, out)
    train(prepared, out, report_to=report_to or (), quiet=quiet)
    show_run(out, as_json=as_json, quiet=quiet)
