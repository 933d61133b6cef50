"""A client's training step: ours, fused and one client at a time, PEFT's, and the papers' layer.

    python benchmarks/step.py --write                 # 8 clients, 1, 4 and 8 examples each
    python benchmarks/step.py --sizes 40M --clients 1 8 32 --each 1
    python benchmarks/step.py --model smollm2 --turns 2 --write     # a real base model

Random weights, or those of a `--model`; texts of random tokens,
40 to 160 of them, of which the last 15 % are the answer. Every variant
takes two steps for each client on the same examples, in turns (A B C D A B C D ..); what counts
are the ratios of their medians. Gradients are compared in the same run, without dropout: FedALT's
with those of `written`, and those of a single LoRA with PEFT's.

    fused      this package, clients together in passes of its own size
    alone      this package, one client at a time
    peft       (a) PEFT's LoRA on the stock model, one client at a time, padded, all logits
    written    (b) FedALT's layer as the papers write it: slot by slot, padded, all logits
    trainer    (c) PEFT's LoRA in a `Trainer` for each client, as transformers documents it

With --profile instead: where the time of `fused` goes, operation by operation, in percent. With
--gradients instead: how far the gradients of both layers are from those in float64, and how far
from each other if both are computed in float64.

The bound is the forward pass and the gradient of the inputs through the frozen base, with logits
where a label is, at the rate of this machine's matmuls: `useful` is the share of that rate which
the fastest of our two variants reaches. `kept` is what waits for the backward pass, for each token.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from document import table, write
from step_variants import (
    SIZES,
    STEPS,
    Clients,
    Ours,
    Stock,
    disagreement,
    examples_of,
    model_of,
    plan_of,
    rounding_of,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from fedalt.core.settings import PACKAGED
from fedalt.training.batches import collate
from fedalt.training.loss import token_losses


def kept(step: Callable[[], object], model: nn.Module) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass."""
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outcome = step()  # alive until all is counted: else memory would be used twice
    del outcome
    return sum(seen.values())


def matmul_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Multiplications and additions a second of a large product."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        wait(device)
        began = time.perf_counter()
        left @ right
        wait(device)
        times.append(time.perf_counter() - began)
    return float(2 * size**3 / statistics.median(times))


def wait(device: str) -> None:
    """Until a device has done what it was told to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def bound_of(model: PreTrainedModel, clients: Clients) -> float:
    """Multiplications and additions that no step can do without."""
    outputs, inputs = (
        each.weight for each in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    head, embedding, tied = outputs.numel(), inputs.numel(), outputs is inputs
    body = sum(each.numel() for each in model.parameters()) - embedding - (0 if tied else head)
    texts = [text for each in clients for text in each]
    tokens = sum(len(text.ids) for text in texts)
    labelled = sum(len(text.ids) - text.answer_start for text in texts)
    return float(4 * (body * tokens + head * labelled))


def data_of(size: str, clients: int, each: int) -> Clients:
    """Texts for a model."""
    return examples_of(clients, each, model_of(size).config.vocab_size)


def measure(size: str, clients: int, each: int, turns: int) -> Mapping[str, Any]:
    """One row of the table."""
    data = data_of(size, clients, each)
    ours = Ours(model_of(size), data)
    written = Stock.written(model_of(size), data, ours.tree)
    peft = Stock.peft(model_of(size), data, ours.tree)
    variants: dict[str, Callable[[], None]] = {
        "fused": lambda: ours.train(together=True),
        "alone": lambda: ours.train(together=False),
        "peft": peft.train,
        "written": written.train,
        "trainer": peft.train_as_documented,
    }
    wrong = max(disagreement(ours, written), disagreement(ours, peft, plain=True))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    rates = []
    for turn in range(turns + 1):
        for name, run in variants.items():
            began = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                seconds[name].append((time.perf_counter() - began) / STEPS)
        rates.append(matmul_rate())
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    tokens = sum(len(text.ids) for group in data for text in group)
    best = min(median["fused"], median["alone"])
    useful = bound_of(model_of(size), data) / best / statistics.median(rates)
    one = Ours(model_of(size), data[:1])
    batch = collate(one.clients, 0, one.base.adapted.device, pack=True)
    leaves = {
        name: leaf.clone().requires_grad_(name in one.names) for name, leaf in one.tree.items()
    }
    with one.base.adapted.bound(plan_of(0), leaves, packing=batch.packing) as model:
        mine = kept(lambda: token_losses(model, batch).mean(), model)
    theirs = kept(lambda: written.loss(data[0]), written.model)
    first = sum(len(text.ids) for text in data[0])
    peft_, written_ = median["peft"], median["written"]
    return {
        "model": size,
        "clients": clients,
        "examples": each,
        "fused / peft": f"{peft_ / median['fused']:.2f}",
        "fused / trainer": f"{median['trainer'] / median['fused']:.2f}",
        "fused / written": f"{written_ / median['fused']:.2f}",
        "alone / peft": f"{peft_ / median['alone']:.2f}",
        "alone / written": f"{written_ / median['alone']:.2f}",
        "fused / alone": f"{median['alone'] / median['fused']:.2f}",
        "tokens/s, fused": round(tokens / median["fused"]),
        "useful": f"{useful:.2f}",
        "kept, KB a token": round(mine / first / 1e3),
        "of written": f"{mine / theirs:.2f}",
        "gradients differ by": f"{wrong:.0e}",
    }


def profiled(size: str, clients: int, each: int) -> Mapping[str, Any]:
    """Percent of the time of our step, by torch's operations; those above 1."""
    ours = Ours(model_of(size), data_of(size, clients, each))
    ours.train(together=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        ours.train(together=True)
    found = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    whole = sum(found.values())
    ranked = sorted(found.items(), key=lambda pair: -pair[1])
    shares = {name: f"{100 * spent / whole:.1f}" for name, spent in ranked if spent > whole / 100}
    return {"model": size, "clients": clients, "examples": each, **shares}


def rounding(size: str, clients: int, each: int) -> Mapping[str, Any]:
    """How far gradients in float32 are from those in float64, and ours in float64 from `written`'s.

    Norms and softmaxes of transformers' models are in float32 in any case.
    """
    data = data_of(size, clients, each)
    ours = Ours(model_of(size), data)
    written = Stock.written(model_of(size), data, ours.tree)
    exact = Ours(copy.deepcopy(model_of(size)).double(), data)
    exact.tree = {name: leaf.double() for name, leaf in ours.tree.items()}
    exactly_written = Stock.written(copy.deepcopy(model_of(size)).double(), data, exact.tree)
    return {
        "model": size,
        "clients": clients,
        "examples": each,
        "ours from float64": f"{disagreement(ours, exactly_written):.0e}",
        "written from float64": f"{rounding_of(written, exactly_written, ours.names):.0e}",
        "both in float64": f"{disagreement(exact, exactly_written):.0e}",
    }


def main() -> None:
    """Measure and print a line for every cell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--model", choices=PACKAGED, help="a real base instead of the sizes")
    parser.add_argument("--clients", nargs="+", type=int, default=[8])
    parser.add_argument("--each", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--turns", type=int, default=5)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--profile", action="store_true", help="say where the time goes")
    what.add_argument("--gradients", action="store_true", help="say what is rounding")
    what.add_argument("--write", action="store_true", help="put the table into the document")
    options = parser.parse_args()
    rows = []
    for size in [options.model] if options.model else options.sizes:
        for clients in options.clients:
            for each in options.each:
                if options.profile or options.gradients:
                    other = profiled if options.profile else rounding
                    rows.append(other(size, clients, each))
                else:
                    rows.append(measure(size, clients, each, options.turns))
                print(json.dumps(rows[-1]), flush=True)
    if options.write:
        write("step-of-a-real-base" if options.model else "step", table(rows))


if __name__ == "__main__":
    main()
