"""Numbers for Prometheus, in its text format; none of them tells of a text."""

from collections.abc import Iterable, Mapping

from fedalt.serving.engine import Engine


def exposition(engine: Engine, statuses: Mapping[int, int]) -> str:
    """All numbers."""
    counts = engine.counts
    lines = [
        *_metric("requests_running", "gauge", "Requests being answered.", engine.running),
        *_metric("requests_waiting", "gauge", "Requests that wait.", engine.waiting),
        *_metric("prompt_tokens_total", "counter", "Tokens read.", counts["prompt_tokens"]),
        *_metric("written_tokens_total", "counter", "Tokens written.", counts["written_tokens"]),
        *_metric("passes_total", "counter", "Shared passes for one more token.", counts["passes"]),
        *_metric("rows_total", "counter", "Requests in those passes.", counts["rows"]),
        *_metric("reloads_total", "counter", "New best rounds taken over.", counts["reloads"]),
        *_head("responses_total", "counter", "Responses by HTTP status."),
    ]
    lines += [
        f'fedalt_responses_total{{status="{status}"}} {count}'
        for status, count in sorted(statuses.items())
    ]
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, text: str, value: int) -> Iterable[str]:
    return (*_head(name, kind, text), f"fedalt_{name} {value}")


def _head(name: str, kind: str, text: str) -> Iterable[str]:
    return f"# HELP fedalt_{name} {text}", f"# TYPE fedalt_{name} {kind}"
