"""The variants of a client's training step that step.py and gpu.py compare.

Each is built around a model, and several models may share their frozen weights; see `copy_of`.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import Mixer, Plan, Slot, single
from fedalt.core.tree import Name, Tree, merge, select
from fedalt.data.examples import Example
from fedalt.models.base import Base, load_network, location
from fedalt.models.config import network_config
from fedalt.training.batches import collate
from fedalt.training.group import Share, Training
from fedalt.training.loop import passes, train_together
from fedalt.training.loss import autocast, client_means, token_losses
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
LR, WEIGHT_DECAY, CLIP = 1e-3, 0.05, 1.0
SITES = ["q_proj", "v_proj"]
Clients = Sequence[Sequence[Example]]


class Tokenless:
    """The model knows no text: examples are made of token ids."""

    pad_token_id = 0
    eos_token_id = 1


def random_llama(sizes: Mapping[str, Any]) -> PreTrainedModel:
    """A frozen Llama with random weights; what `sizes` leave open is what Llamas of a size have."""
    torch.manual_seed(0)
    usual = {
        "num_attention_heads": sizes["hidden_size"] // 64,
        "intermediate_size": int(sizes["hidden_size"] * 8 / 3) // 64 * 64,
        "max_position_embeddings": 512,
    }
    return LlamaForCausalLM(LlamaConfig(**{**usual, **sizes})).eval().requires_grad_(False)


@cache
def base_of(name: str) -> PreTrainedModel:
    """The frozen base model of a size, or the packaged one of a name, in float32 on the CPU."""
    if name in SIZES:
        return random_llama(SIZES[name])
    place = location(name)
    config = network_config(name, place, ())
    loaded, _ = load_network(name, place, config, labels=(), device="cpu")
    return loaded.model.eval().requires_grad_(False)


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """Other modules around the same weights: a variant may wrap or replace them."""
    weights: dict[int, Any] = {id(each): each for each in model.parameters()}
    return copy.deepcopy(model, weights)


def model_of(name: str) -> PreTrainedModel:
    """A copy of `base_of` for one variant."""
    return copy_of(base_of(name))


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


def tree_of(init: Initializer, plan: Plan) -> Tree:
    """The same start for every client, with a rest of world and an individual LoRA of some size."""
    stream = torch.Generator().manual_seed(2)
    tree = merge(*(init.adapter(slot) for slot in plan.slots), init.mixer(len(plan.slots)))
    for name in tree:
        if name.factor == "B":
            tree[name] = 0.01 * torch.randn(tree[name].shape, generator=stream)
    return tree


class Ours:
    """Training with fedalt, of clients together or one at a time."""

    def __init__(self, model: PreTrainedModel, clients: Clients) -> None:
        adapted = AdaptedModel(model, SITES)
        self.base = Base(adapted, Tokenless(), "", "")
        self.clients = clients
        self.tree = tree_of(Initializer(adapted.sites, {}, 0), plan_of(0))
        self.names = frozenset(self.tree) - frozenset(select(self.tree, "row"))

    def train(self, *, together: bool) -> None:
        """Two steps for each client."""
        order = Fit(plan_of(DROPOUT), self.tree, self.names)
        training = Training(lr=LR, local_epochs=STEPS, batch_size=max(map(len, self.clients)))
        shares = [Share(order, each, seed) for seed, each in enumerate(self.clients)]
        sizes = {str(at): sum(len(e.ids) for e in each) for at, each in enumerate(self.clients)}
        groups = passes(self.base, training, sizes) if together else [[at] for at in sizes]
        for group in groups:
            train_together(self.base, [shares[int(at)] for at in group], training)

    def gradients(self, *, plain: bool = False) -> tuple[list[float], list[Tree]]:
        """Each client's loss and gradients, all clients in one pass, without dropout.

        `plain`: with the individual LoRA alone, as PEFT has it.
        """
        plan = single(plan_of(0).slots[0]) if plain else plan_of(0)
        tree = select(self.tree, "individual") if plain else self.tree
        names = frozenset(tree) & self.names
        adapted = self.base.adapted
        stacked = {
            name: torch.stack([leaf] * len(self.clients)).to(adapted.device)
            for name, leaf in tree.items()
        }
        for name in names:
            stacked[name].requires_grad_()
        batch = collate(self.clients, 0, adapted.device, pack=True)
        with adapted.bound(plan, stacked, packing=batch.packing) as model:
            losses = client_means(token_losses(model, batch), batch, len(self.clients))
            losses.sum().backward()
        grads = [
            {name: stacked[name].grad[at].cpu() for name in names}  # type: ignore[index]
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


def padded(examples: Sequence[Example]) -> dict[str, Tensor]:
    """What a transformers model takes: padded on the right, with labels at the answers alone."""
    batch = collate([examples], 0, torch.device("cpu"))
    labels = torch.full_like(batch.ids, -100)
    for row, example in enumerate(examples):
        answer = slice(example.answer_start, len(example.ids))
        labels[row, answer] = batch.ids[row, answer]
    assert batch.mask is not None
    return {"input_ids": batch.ids, "attention_mask": batch.mask, "labels": labels}


class Stock:
    """A model with its own parameters, trained the usual way."""

    def __init__(self, model: nn.Module, clients: Clients, leaf_of: Callable[..., Any]) -> None:
        """`leaf_of` finds the parameter of a name of our tree."""
        self.model, self.clients, self.leaf_of = model.eval(), clients, leaf_of
        self.parameters = [each for each in model.parameters() if each.requires_grad]
        self.first = [each.detach().clone() for each in self.parameters]

    @staticmethod
    def written(model: PreTrainedModel, clients: Clients, tree: Tree) -> "Stock":
        """(b)."""
        for site in {name.site: None for name in tree}:
            parent, _, child = site.rpartition(".")
            layer = Written(model.get_submodule(site), site, tree).to(model.device)
            setattr(model.get_submodule(parent), child, layer)

        def leaf_of(name: Name) -> Any:
            layer: Any = model.get_submodule(name.site)
            return layer.g if name.factor == "G" else getattr(layer, name.factor.lower())[0]

        return Stock(model, clients, leaf_of)

    @staticmethod
    def peft(model: PreTrainedModel, clients: Clients, tree: Tree) -> "Stock":
        """(a), from the individual LoRA of a tree."""
        config = LoraConfig(
            r=RANK, lora_alpha=int(ALPHA), lora_dropout=DROPOUT, target_modules=SITES
        )
        wrapped = get_peft_model(model, config)

        def leaf_of(name: Name) -> Any:
            layer: Any = wrapped.get_submodule(f"base_model.model.{name.site}")
            return getattr(layer, f"lora_{name.factor}")["default"].weight

        with torch.no_grad():
            for name, tensor in select(tree, "individual").items():
                leaf_of(name).copy_(tensor)
        return Stock(wrapped, clients, leaf_of)

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Transformers' own loss on a padded batch."""
        device = self.parameters[0].device
        batch = {name: tensor.to(device) for name, tensor in padded(examples).items()}
        with autocast(device):
            return self.model(**batch, use_cache=False).loss  # type: ignore[no-any-return]

    def start_again(self) -> None:
        """Every client begins with the same numbers."""
        with torch.no_grad():
            for parameter, first in zip(self.parameters, self.first, strict=True):
                parameter.copy_(first)

    def train(self) -> None:
        """Two steps for each client from the same start."""
        self.model.train()
        for examples in self.clients:
            self.start_again()
            optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=WEIGHT_DECAY)
            for _ in range(STEPS):
                optimizer.zero_grad()
                self.loss(examples).backward()
                nn.utils.clip_grad_norm_(self.parameters, CLIP)
                optimizer.step()
        self.model.eval()

    def train_as_documented(self) -> None:
        """The same by a `Trainer` for each client; its own defaults for all that is not named."""
        for examples in self.clients:
            self.start_again()
            # It prints a line at its end, even where nothing is to be reported.
            with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
                arguments = TrainingArguments(
                    output_dir=folder,
                    num_train_epochs=STEPS,
                    per_device_train_batch_size=len(examples),
                    learning_rate=LR,
                    weight_decay=WEIGHT_DECAY,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    remove_unused_columns=False,
                    use_cpu=True,
                )
                Trainer(
                    model=self.model,
                    args=arguments,
                    train_dataset=list(examples),
                    data_collator=padded,
                ).train()
        self.model.eval()

    def gradients(self, names: Iterable[Name]) -> tuple[list[float], list[Tree]]:
        """Each client's loss and its gradients of some names of our tree."""
        wanted, losses, grads = list(names), [], []
        for examples in self.clients:
            self.model.zero_grad()
            loss = self.loss(examples)
            loss.backward()
            losses.append(float(loss.detach()))
            grads.append({name: self.leaf_of(name).grad.cpu().clone() for name in wanted})
        return losses, grads


def disagreement(ours: Ours, stock: Stock, *, plain: bool = False) -> float:
    """The largest difference of a gradient, as a share of the norm of that tensor's gradient.

    `plain`: of the individual LoRA alone, for `Stock.peft`.
    """
    losses, mine = ours.gradients(plain=plain)
    return _furthest(losses, mine, *stock.gradients(mine[0]))


def rounding_of(low: Stock, exact: Stock, names: Iterable[Name]) -> float:
    """The same of a layer in float32 and in float64."""
    return _furthest(*low.gradients(names), *exact.gradients(names))


def _furthest(
    losses: Sequence[float], mine: Sequence[Tree], others: Sequence[float], theirs: Sequence[Tree]
) -> float:
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))
    for one, other in zip(mine, theirs, strict=True):
        for name, gradient in one.items():
            norm = float(other[name].norm())
            worst = max(worst, float((gradient - other[name]).norm()) / norm)
    return worst
