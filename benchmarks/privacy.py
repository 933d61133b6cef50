"""What DP-SGD costs a client's training step: fused with it and without, and with Opacus.

    pip install --no-deps opacus opt_einsum    # of no extra: nothing but this needs it
    python benchmarks/privacy.py --sizes 5M 40M

The setting is that of step.py, with one LoRA and no mixer, which PEFT has as well; every text is in
every batch, so that all variants compute the same texts. They take turns (A B C D A B C D ..);
what counts are the ratios of their medians, of processor time.

    plain      this package, clients together, no privacy
    private    the same by DP-SGD
    alone      the same, one client at a time
    opacus     PEFT's LoRA on the stock model with Opacus, one client at a time, padded
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from peft import LoraConfig, get_peft_model
from step_variants import (
    ALPHA,
    DROPOUT,
    RANK,
    SITES,
    SIZES,
    STEPS,
    Clients,
    Ours,
    examples_of,
    model_of,
)
from torch import nn

from fedalt.adapters.plan import Plan, Slot, Sum
from fedalt.core.noise import Randomness
from fedalt.core.tree import select
from fedalt.data.examples import Example
from fedalt.training.batches import collate
from fedalt.training.clipping import Clipping
from fedalt.training.group import Share, Training
from fedalt.training.loop import passes, train_together
from fedalt.training.orders import Fit

PLAN = Plan((Slot("individual", RANK, ALPHA),), Sum((1.0,)), DROPOUT)


def train(ours: Ours, *, private: bool, together: bool) -> None:
    """Two steps for each client."""
    tree = select(ours.tree, "individual")
    order = Fit(PLAN, tree, frozenset(tree))
    training = Training(lr=1e-3, local_epochs=STEPS, batch_size=max(map(len, ours.clients)))
    shares = [
        Share(order, each, seed, Clipping(1.0, 1.0, Randomness()) if private else None)
        for seed, each in enumerate(ours.clients)
    ]
    sizes = {str(at): sum(len(e.ids) for e in each) for at, each in enumerate(ours.clients)}
    groups = passes(ours.base, training, sizes) if together else [[at] for at in sizes]
    for group in groups:
        train_together(ours.base, [shares[int(at)] for at in group], training)


class Opacus:
    """PEFT's LoRA trained by Opacus, client after client."""

    def __init__(self, size: str, clients: Clients) -> None:
        from opacus import GradSampleModule

        config = LoraConfig(
            r=RANK, lora_alpha=int(ALPHA), lora_dropout=DROPOUT, target_modules=SITES
        )
        self.model = GradSampleModule(get_peft_model(model_of(size), config), loss_reduction="sum")
        self.clients = clients
        self.parameters = [each for each in self.model.parameters() if each.requires_grad]

    def train(self) -> None:
        """Two steps for each client."""
        from opacus.optimizers import DPOptimizer

        self.model.train()
        for examples in self.clients:
            descent = torch.optim.AdamW(self.parameters, lr=1e-3, weight_decay=0.05)
            optimizer = DPOptimizer(
                descent, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(examples)
            )
            for _ in range(STEPS):
                optimizer.zero_grad()
                self.losses(examples).sum().backward()
                optimizer.step()

    def losses(self, examples: Sequence[Example]) -> torch.Tensor:
        """Each text's mean loss over its answer, (texts,)."""
        batch = collate([examples], 0, torch.device("cpu"))
        logits = self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        means = []
        for row, each in enumerate(examples):
            here = slice(each.answer_start - 1, len(each.ids) - 1)
            labels = batch.ids[row, each.answer_start : len(each.ids)]
            means.append(nn.functional.cross_entropy(logits[row, here], labels))
        return torch.stack(means)


def measure(size: str, clients: int, each: int, turns: int) -> str:
    """A line for a size and a number of texts: medians, and their ratios to `private`."""
    data = examples_of(clients, each, SIZES[size]["vocab_size"])
    ours = Ours(model_of(size), data)
    variants: dict[str, Callable[[], None]] = {
        "plain": lambda: train(ours, private=False, together=True),
        "private": lambda: train(ours, private=True, together=True),
        "alone": lambda: train(ours, private=True, together=False),
    }
    if find_spec("opacus") is not None:
        variants["opacus"] = Opacus(size, data).train
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 1):
        for name, variant in variants.items():
            began = time.process_time()
            variant()
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    private = medians["private"]
    told = [
        f"{name} {median:.2f} s ({median / private:.2f} of private)"
        for name, median in medians.items()
    ]
    cost = f"private / plain {private / medians['plain']:.2f}"
    return f"{size}, {clients} clients with {each} texts each: {', '.join(told)}; {cost}"


def main() -> None:
    """Print a line for each size and number of texts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["5M"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--each", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--turns", type=int, default=5)
    chosen = parser.parse_args()
    for size in chosen.sizes:
        for each in chosen.each:
            print(measure(size, chosen.clients, each, chosen.turns), flush=True)


if __name__ == "__main__":
    main()
