"""A client's training step: ours, fused and one client at a time, PEFT's, and the papers' layer.

    python benchmarks/step.py --write                 # 8 clients, 1, 4 and 8 examples each
    python benchmarks/step.py --sizes 40M --clients 1 8 32 --each 1

Random weights; texts of 40 to 160 tokens, of which the last 15 % are the answer. Every variant
takes two steps for each client on the same examples, in turns (A B C D A B C D ..); what counts
are the ratios of their medians. Gradients are compared in the same run, without dropout.

    fused      this package, clients together in passes of its own size
    alone      this package, one client at a time
    peft       (a) PEFT's LoRA on the stock model, one client at a time, padded, all logits
    written    (b) FedALT's layer as the papers write it: slot by slot, padded, all logits

With --profile instead: where the time of `fused` goes, operation by operation, in percent.

The bound is the forward pass and the gradient of the inputs through the frozen base, with logits
where a label is, at the rate of this machine's matmuls: `useful` is the share of that rate which
the fastest of our two variants reaches. `kept` is what waits for the backward pass, for each token.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from document import table, write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import Mixer, Plan, Slot
from fedalt.adapters.start import Start
from fedalt.core.tree import Tree, merge, select
from fedalt.data.examples import Example
from fedalt.models.base import Base
from fedalt.training.batches import collate
from fedalt.training.group import Share, Training
from fedalt.training.loop import passes, train_together
from fedalt.training.loss import client_means, token_losses
from fedalt.training.orders import Fit

SIZES: dict[str, dict[str, Any]] = {
    "5M": {"hidden_size": 256, "num_hidden_layers": 6, "vocab_size": 8192},
    "40M": {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 32000},
    "110M": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
}
RANK, ALPHA, DROPOUT, STEPS = 8, 16.0, 0.05, 2
SITES = ["q_proj", "v_proj"]
Clients = Sequence[Sequence[Example]]


class Tokenless:
    """The model knows no text: examples are made of token ids."""

    pad_token_id = 0
    eos_token_id = 1


def model_of(size: str) -> LlamaForCausalLM:
    """A frozen Llama with random weights."""
    torch.manual_seed(0)
    sizes = SIZES[size]
    config = LlamaConfig(
        **sizes,
        num_attention_heads=sizes["hidden_size"] // 64,
        intermediate_size=int(sizes["hidden_size"] * 8 / 3) // 64 * 64,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def examples_of(clients: int, each: int, vocabulary: int) -> list[list[Example]]:
    """Every client's texts, the last 15 % of each labelled."""
    stream = torch.Generator().manual_seed(1)
    groups = []
    for _ in range(clients):
        texts = []
        for _ in range(each):
            length = int(torch.randint(40, 161, (), generator=stream))
            ids = torch.randint(2, vocabulary, (length,), generator=stream).tolist()
            texts.append(Example(tuple(ids), length - max(1, round(0.15 * length)), ""))
        groups.append(texts)
    return groups


def plan_of(dropout: float) -> Plan:
    """FedALT's plan."""
    return Plan((Slot("individual", RANK, ALPHA), Slot("row", RANK, ALPHA)), Mixer(), dropout)


def tree_of(start: Start, plan: Plan) -> Tree:
    """The same start for every client, with a rest of world and an individual LoRA of some size."""
    stream = torch.Generator().manual_seed(2)
    tree = merge(*(start.adapter(slot) for slot in plan.slots), start.mixer(len(plan.slots)))
    for name in tree:
        if name.factor == "B":
            tree[name] = 0.01 * torch.randn(tree[name].shape, generator=stream)
    return tree


class Ours:
    """Training with fedalt, of clients together or one at a time."""

    def __init__(self, size: str, clients: Clients) -> None:
        adapted = AdaptedModel(model_of(size), SITES)
        self.base = Base(adapted, Tokenless(), size, "")
        self.clients = clients
        self.tree = tree_of(Start(adapted.sites, {}, 0), plan_of(0))
        self.names = frozenset(self.tree) - frozenset(select(self.tree, "row"))

    def train(self, *, together: bool) -> None:
        """Two steps for each client."""
        order = Fit(plan_of(DROPOUT), self.tree, self.names)
        training = Training(lr=1e-3, local_epochs=STEPS, batch_size=max(map(len, self.clients)))
        shares = [Share(order, each, seed) for seed, each in enumerate(self.clients)]
        sizes = {str(at): sum(len(e.ids) for e in each) for at, each in enumerate(self.clients)}
        groups = passes(self.base, training, sizes) if together else [[at] for at in sizes]
        for group in groups:
            train_together(self.base, [shares[int(at)] for at in group], training)

    def gradients(self) -> tuple[list[float], list[Tree]]:
        """Each client's loss and gradients, all clients in one pass, without dropout."""
        stacked = {
            name: torch.stack([leaf] * len(self.clients)).requires_grad_(name in self.names)
            for name, leaf in self.tree.items()
        }
        adapted = self.base.adapted
        batch = collate(self.clients, 0, adapted.device, pack=True)
        with adapted.bound(plan_of(0), stacked, packing=batch.packing) as model:
            losses = client_means(token_losses(model, batch), batch, len(self.clients))
            losses.sum().backward()
        grads = [
            {name: stacked[name].grad[at] for name in self.names}  # type: ignore[index]
            for at in range(len(self.clients))
        ]
        return losses.tolist(), grads


class Written(nn.Module):
    """FedALT's layer as it is usually written: one slot after the other, a softmax over both."""

    def __init__(self, base: nn.Linear, site: str, tree: Tree) -> None:
        super().__init__()
        self.base = base
        factors = {(n.slot, n.factor): leaf for n, leaf in tree.items() if n.site == site}
        self.a, self.b = (
            nn.ParameterList(
                nn.Parameter(factors[slot, f].clone()) for slot in ("individual", "row")
            )
            for f in "AB"
        )
        self.g = nn.Parameter(factors["mixer", "G"].clone())
        self.a[1].requires_grad_(False)
        self.b[1].requires_grad_(False)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, d_in) -> (batch, tokens, d_out)."""
        out: Tensor = self.base(x)
        weights = torch.softmax(x @ self.g.T, dim=-1)
        dropped = self.dropout(x)
        for slot in range(2):
            low = (dropped @ self.a[slot].T) @ self.b[slot].T
            out = out + weights[..., slot : slot + 1] * low * (ALPHA / RANK)
        return out


class Stock:
    """A model with its own parameters, trained the usual way."""

    def __init__(self, model: nn.Module, clients: Clients) -> None:
        self.model, self.clients = model.eval(), clients
        self.parameters = [each for each in model.parameters() if each.requires_grad]
        self.first = [each.detach().clone() for each in self.parameters]

    @staticmethod
    def written(size: str, clients: Clients, tree: Tree) -> "Stock":
        """(b)."""
        model = model_of(size)
        for site in {name.site: None for name in tree}:
            parent, _, child = site.rpartition(".")
            layer = Written(model.get_submodule(site), site, tree)
            setattr(model.get_submodule(parent), child, layer)
        return Stock(model, clients)

    @staticmethod
    def peft(size: str, clients: Clients) -> "Stock":
        """(a)."""
        config = LoraConfig(
            r=RANK, lora_alpha=int(ALPHA), lora_dropout=DROPOUT, target_modules=SITES
        )
        return Stock(get_peft_model(model_of(size), config), clients)

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Transformers' own loss on a padded batch."""
        batch = collate([examples], 0, torch.device("cpu"))
        labels = torch.full_like(batch.ids, -100)
        for row, each in enumerate(examples):
            here = slice(each.answer_start, len(each.ids))
            labels[row, here] = batch.ids[row, here]
        out = self.model(
            input_ids=batch.ids, attention_mask=batch.mask, labels=labels, use_cache=False
        )
        return out.loss  # type: ignore[no-any-return]

    def train(self) -> None:
        """Two steps for each client from the same start."""
        self.model.train()
        for examples in self.clients:
            with torch.no_grad():
                for parameter, first in zip(self.parameters, self.first, strict=True):
                    parameter.copy_(first)
            optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, weight_decay=0.05)
            for _ in range(STEPS):
                optimizer.zero_grad()
                self.loss(examples).backward()
                nn.utils.clip_grad_norm_(self.parameters, 1.0)
                optimizer.step()
        self.model.eval()

    def gradients(self, tree: Tree) -> tuple[list[float], list[Tree]]:
        """Each client's loss and gradients; only of a model of `written`."""
        losses, grads = [], []
        for examples in self.clients:
            self.model.zero_grad()
            loss = self.loss(examples)
            loss.backward()
            losses.append(float(loss.detach()))
            found: Tree = {}
            for name in tree:
                layer = self.model.get_submodule(name.site)
                leaf: Any = (
                    layer.g if name.factor == "G" else getattr(layer, name.factor.lower())[0]
                )
                if name.slot != "row":
                    found[name] = leaf.grad.clone()
            grads.append(found)
        return losses, grads


def disagreement(ours: Ours, written: Stock) -> float:
    """The largest difference of a gradient, as a share of the norm of that tensor's gradient."""
    losses, mine = ours.gradients()
    others, theirs = written.gradients(ours.tree)
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))
    for one, other in zip(mine, theirs, strict=True):
        for name, gradient in one.items():
            norm = float(other[name].norm())
            worst = max(worst, float((gradient - other[name]).norm()) / norm)
    return worst


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


def matmul_rate() -> float:
    """Multiplications and additions a second of a large float32 product."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    return float(2 * 1024**3 / statistics.median(times))


def bound_of(model: LlamaForCausalLM, clients: Clients) -> float:
    """Multiplications and additions that no step can do without."""
    head = model.lm_head.weight.numel()
    embedding = model.model.embed_tokens.weight.numel()
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    body = sum(each.numel() for each in model.parameters()) - embedding - (0 if tied else head)
    texts = [text for each in clients for text in each]
    tokens = sum(len(text.ids) for text in texts)
    labelled = sum(len(text.ids) - text.answer_start for text in texts)
    return float(4 * (body * tokens + head * labelled))


def measure(size: str, clients: int, each: int, turns: int) -> Mapping[str, Any]:
    """One row of the table."""
    data = examples_of(clients, each, SIZES[size]["vocab_size"])
    ours = Ours(size, data)
    written, peft = Stock.written(size, data, ours.tree), Stock.peft(size, data)
    variants: dict[str, Callable[[], None]] = {
        "fused": lambda: ours.train(together=True),
        "alone": lambda: ours.train(together=False),
        "peft": peft.train,
        "written": written.train,
    }
    wrong = disagreement(ours, written)
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
    useful = bound_of(written.model, data) / best / statistics.median(rates)
    one = Ours(size, data[:1])
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
    ours = Ours(size, examples_of(clients, each, SIZES[size]["vocab_size"]))
    ours.train(together=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        ours.train(together=True)
    found = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    whole = sum(found.values())
    ranked = sorted(found.items(), key=lambda pair: -pair[1])
    shares = {name: f"{100 * spent / whole:.1f}" for name, spent in ranked if spent > whole / 100}
    return {"model": size, "clients": clients, "examples": each, **shares}


def main() -> None:
    """Measure and print a line for every cell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--clients", nargs="+", type=int, default=[8])
    parser.add_argument("--each", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        for clients in options.clients:
            for each in options.each:
                if options.profile:
                    rows.append(profiled(size, clients, each))
                else:
                    rows.append(measure(size, clients, each, options.turns))
                print(json.dumps(rows[-1]), flush=True)
    if options.write:
        write("step", table(rows))


if __name__ == "__main__":
    main()
