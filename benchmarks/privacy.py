"""What DP-SGD costs a client's training step: fused with it and without, and one client at a time.

    python benchmarks/privacy.py --sizes 5M 40M

The setting is that of step.py; every text is in every batch, so that all variants compute the same
texts. They take turns; what counts are the ratios of their medians, of processor time.
"""

import argparse
import statistics
import time
from collections.abc import Callable

from step_variants import SIZES, STEPS, Ours, examples_of, model_of, plan_of

from fedalt.core.noise import Randomness
from fedalt.training.clipping import Clipping
from fedalt.training.group import Share, Training
from fedalt.training.loop import passes, train_together
from fedalt.training.orders import Fit


def train(ours: Ours, *, private: bool, together: bool) -> None:
    """Two steps for each client."""
    order = Fit(plan_of(0.05), ours.tree, ours.names)
    training = Training(lr=1e-3, local_epochs=STEPS, batch_size=max(map(len, ours.clients)))
    shares = [
        Share(order, each, seed, Clipping(1.0, 1.0, Randomness()) if private else None)
        for seed, each in enumerate(ours.clients)
    ]
    sizes = {str(at): sum(len(e.ids) for e in each) for at, each in enumerate(ours.clients)}
    groups = passes(ours.base, training, sizes) if together else [[at] for at in sizes]
    for group in groups:
        train_together(ours.base, [shares[int(at)] for at in group], training)


def main() -> None:
    """Print a line for each size and number of texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["5M"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--each", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--turns", type=int, default=5)
    chosen = parser.parse_args()
    for size in chosen.sizes:
        for each in chosen.each:
            ours = Ours(
                model_of(size), examples_of(chosen.clients, each, SIZES[size]["vocab_size"])
            )
            variants: dict[str, Callable[[], None]] = {
                "plain": lambda o=ours: train(o, private=False, together=True),  # type: ignore[misc]
                "private": lambda o=ours: train(o, private=True, together=True),  # type: ignore[misc]
                "alone": lambda o=ours: train(o, private=True, together=False),  # type: ignore[misc]
            }
            seconds: dict[str, list[float]] = {name: [] for name in variants}
            for turn in range(chosen.turns + 1):
                for name, variant in variants.items():
                    began = time.process_time()
                    variant()
                    if turn:  # the first warms up
                        seconds[name].append(time.process_time() - began)
            medians = {name: statistics.median(taken) for name, taken in seconds.items()}
            print(
                f"{size}, {chosen.clients} clients with {each} texts each: plain "
                f"{medians['plain']:.2f} s, private {medians['private']:.2f} s "
                f"({medians['private'] / medians['plain']:.2f} times), private one client at a "
                f"time {medians['alone']:.2f} s"
            )


if __name__ == "__main__":
    main()
