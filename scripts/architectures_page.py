"""docs/architectures.md out of what scripts/architectures.py has found."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

_HEAD = """# Architectures

fedalt adapts the linear layers of any model that transformers loads. When a model is loaded, fedalt
tests the rest with numbers: whether a token's logits depend on later tokens, which layers a text
passes through, whether several texts can share one row, and whether a prompt may be padded on the
left. A model that fails is refused in one sentence or uses a slower path.

`python scripts/architectures.py --write` writes this page. It makes a tiny random model of every
architecture that transformers {transformers} offers for causal language models and sequence
classifiers, and checks for each ({peft}):

* **loss**: losses of answers or labels equal those of transformers alone on each text, to 1e-5. A
  few classifiers change with the padding after a text, in transformers as here; fedalt says so when
  it loads them.
* **trains**: a step with PEFT's default layers (or `all-linear` if it has none) moves the adapter.
* **text**: greedy answers to two prompts of different lengths equal those of transformers alone,
  token for token.
* **export**: the trained adapter, exported as LoRA, gives the same logits in PEFT, and merged with
  `merge_and_unload`, to a relative 2e-4.
* **together**: two clients scored at once get the losses that they get alone, to 1e-5.

Tiny random models show that the arithmetic is right. They do not show how well a real model learns,
nor whether it fits into memory.
"""


def page(causal: Sequence[Any], classifiers: Sequence[Any], unbuilt: Sequence[str]) -> str:
    """The page; rows as `scripts/architectures.py` makes them."""
    parts = [
        _HEAD.format(transformers=version("transformers"), peft=f"with PEFT {version('peft')}"),
        _section("Causal language models", causal, text=True),
        _section("Sequence classifiers", classifiers, text=False),
    ]
    if unbuilt:
        parts.append(
            "## Not tested\n\nNo tiny model was made of these, usually because their "
            "configuration needs special sizes or another package: "
            + ", ".join(f"`{kind}`" for kind in unbuilt)
            + ".\n"
        )
    return "\n".join(parts)


def _section(title: str, rows: Sequence[Any], *, text: bool) -> str:
    tried = [row for row in rows if not row.refused]
    refused = [row for row in rows if row.refused]
    right = sum(row.right for row in tried)
    heads = ["type", "adapted layers", "loss", "trains"]
    heads += ["text"] if text else []
    heads += ["export", "together"]
    lines = [
        f"## {title}",
        "",
        f"{len(rows)} were tested: {right} agree in everything, {len(tried) - right} differ "
        f"somewhere, {len(refused)} refused.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for row in tried:
        cells = [f"`{row.kind}`", str(row.sites), _loss(row), _yes(row.trained)]
        cells += [_yes(row.same_text)] if text else []
        cells += [_small(row.exported, 1e-4), _small(row.together, 1e-5)]
        lines.append(f"| {' | '.join(cells)} |")
    if refused:
        lines += ["", "Refused:", "", "| type | sentence |", "|---|---|"]
        lines += [f"| `{row.kind}` | {row.refused} |" for row in refused]
    return "\n".join([*lines, ""])


def _loss(row: Any) -> str:
    if row.padding:
        return "by padding, reported"
    return _small(row.loss, 1e-5)


def _small(value: float | None, limit: float) -> str:
    if value is None:
        return "not reached"
    return "same" if value < limit else f"**differs by {value:.1g}**"


def _yes(value: bool | None) -> str:
    return "not reached" if value is None else "yes" if value else "**no**"
