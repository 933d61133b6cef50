"""From the parts of a page to one HTML file that needs nothing else; its figures as files."""

import base64
import hashlib
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedalt.core.files import atomic_write, cache_folder, make_private_folder
from fedalt.core.foreign import shown_lines
from fedalt.report.parts import Page

_NEEDED = {"altair": "altair", "jinja2": "jinja2", "vl_convert": "vl-convert-python"}


def missing_for_report() -> list[str]:
    """The packages that draw reports and are not installed."""
    return [name for module, name in _NEEDED.items() if find_spec(module) is None]


def require_report() -> None:
    """Raise ValueError where what draws reports is not installed."""
    if missing := missing_for_report():
        raise ValueError(
            f"a report needs {', '.join(missing)}, not installed: `pip install 'fedalt[report]'`"
        )


def write_page(page: Page, file: Path) -> None:
    """Write the page; the file is replaced whole or not at all."""
    make_private_folder(file.parent)
    atomic_write(file, render(page).encode())


def render(page: Page) -> str:
    """The page as HTML that asks the network for nothing, and may not."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    scripts = [_asset("page.js")]
    specs, datasets = _specs(page)
    if specs:
        scripts = [_vega(), *scripts]
    environment = Environment(
        loader=PackageLoader("fedalt", "report"),
        autoescape=True,
        finalize=_clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        page=page,
        style=_asset("page.css"),
        scripts=scripts,
        hashes=[_digest(script) for script in scripts],
        figures=_json({"specs": specs, "datasets": datasets}),
    )


def _vega() -> str:
    """What draws charts, as one script. To bundle it takes seconds, so it is done once a version.

    A copy in the cache that is damaged is replaced, and a cache that cannot be written to is no
    obstacle.
    """
    import vl_convert

    file = cache_folder() / f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError, UnicodeDecodeError):
        digest, _, script = file.read_bytes().decode().partition("\n")
        if digest == f"// {_digest(script)}":
            return script
    script = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # the stub knows no default
    with suppress(OSError):
        make_private_folder(file.parent)
        atomic_write(file, f"// {_digest(script)}\n{script}".encode())
    return script


def save_figures(page: Page, folder: Path) -> list[Path]:
    """Write every figure as SVG and, twice as fine, as PNG; the files."""
    from vl_convert import vegalite_to_png, vegalite_to_svg

    make_private_folder(folder)
    written = []
    for figure in page.figures():
        spec = figure.chart.to_dict(validate=False)
        svg, png = (folder / f"{figure.name}.{form}" for form in ("svg", "png"))
        atomic_write(svg, vegalite_to_svg(spec).encode())
        spec["config"]["background"] = "white"
        atomic_write(png, vegalite_to_png(spec, scale=2))
        written += [svg, png]
    return written


def _clean(value: Any) -> Any:
    """A value as it may stand on a page: texts without what turns, hides or ends them."""
    return shown_lines(value, sys.maxsize) if type(value) is str else value


def _specs(page: Page) -> tuple[dict[str, Any], dict[str, Any]]:
    """Charts by name, as wide as their place, and the data that they name, each once."""
    specs, datasets = {}, {}
    for figure in page.figures():
        spec = figure.chart.to_dict(validate=False)  # takes long; a test does it
        text = spec["data"]["values"]
        name = hashlib.sha256(text.encode()).hexdigest()[:12]
        datasets[name] = _columns(json.loads(text))
        spec |= {
            "data": {"name": name},
            "width": "container",
        }
        specs[figure.name] = spec
    return specs, datasets


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows of equal keys as lists by key: half the size."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def _json(value: Mapping[str, Any]) -> str:
    """JSON that can stand in a script element: no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair is no character
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _digest(script: str) -> str:
    """What a content security policy knows a script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return files("fedalt.report").joinpath(name).read_text(encoding="utf-8")
