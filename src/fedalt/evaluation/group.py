"""Servings of several clients that share passes through the base model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from fedalt.adapters.binding import Watch
from fedalt.adapters.packing import Packing
from fedalt.adapters.plan import HEAD, Plan, Similarity, single
from fedalt.core import tree as trees
from fedalt.core.tree import Tree
from fedalt.data.examples import Example
from fedalt.methods.contract import Serving
from fedalt.models.base import Base
from fedalt.training.batches import collate, in_turn
from fedalt.training.group import TrainingError, out_of_memory

Ids = Sequence[int]
Share = tuple[int, list[int]]  # a client, and which of its texts
Shares = Sequence[Tensor]  # of each client: (texts, slots), the weights of the slots


@torch.no_grad()
def embed(base: Base, plan: Plan, tree: Tree, prompts: Sequence[Ids], batch_size: int) -> Tensor:
    """The last hidden state at each prompt's last token: (prompts, hidden), float32, on the CPU."""
    return embedded_by(Group(base, [Serving(plan, tree)]), [prompts], batch_size)[0]


@dataclass(frozen=True)
class Group:
    """Servings that agree in plan and shapes; none where the base model stands for itself."""

    base: Base
    servings: Sequence[Serving]

    @property
    def plan(self) -> Plan:
        """The plan of all of them."""
        return self.servings[0].plan

    @contextmanager
    def bound(
        self,
        batch: Sequence[Share],
        shares: Shares | None = None,
        *,
        packing: Packing | None = None,
        watch: Watch | None = None,
    ) -> Iterator[PreTrainedModel]:
        """The model bound to the clients of a batch, whose texts stand client by client."""
        if not self.servings:
            yield self.base.adapted.model
            return
        client_trees = [self.servings[client].tree for client, _ in batch]
        # One client's tree is bound as it is, without a copy.
        tree = (
            client_trees[0]
            if len(client_trees) == 1
            else trees.apply(lambda *all_: torch.stack(all_), *client_trees)
        )
        device = self.base.adapted.device
        weights = None
        if shares is not None:
            weights = torch.cat([shares[client][chosen] for client, chosen in batch])
            if packing is not None:
                weights = weights[_text_of_tokens(packing)]
            weights = weights.to(device)
        with self.base.adapted.bound(
            self.plan,
            trees.on(tree, device),
            shares=weights,
            packing=packing,
            rows=None if packing is not None else [len(chosen) for _, chosen in batch],
            watch=watch,
        ) as model:
            yield model


@contextmanager
def within_memory(texts: int, tokens: int) -> Iterator[None]:
    """While so many texts of so many tokens are scored. Raises TrainingError if memory runs out."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, too
        if not out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory while scoring {texts} texts, {tokens} tokens at once; "
            "lower --eval-batch-size or --max-length"
        ) from error


def embedded_by(group: Group, prompts: Sequence[Sequence[Ids]], batch_size: int) -> list[Tensor]:
    """The last hidden state at each client's prompts' last tokens, on the CPU."""
    states: list[dict[int, Tensor]] = [{} for _ in prompts]
    for batch in in_turn(sizes_of(prompts), batch_size):
        chosen = [tuple(prompts[client][at]) for client, texts in batch for at in texts]
        examples = [Example(ids, len(ids), "", label=0) for ids in chosen]
        padded = collate([examples], group.base.pad_id, group.base.adapted.device)
        with within_memory(len(chosen), padded.ids.numel()), group.bound(batch) as model:
            hidden = model.base_model(padded.ids, attention_mask=padded.mask).last_hidden_state
        last = torch.tensor([len(ids) - 1 for ids in chosen])
        rows = iter(hidden[torch.arange(len(chosen)), last].float().cpu())
        for client, texts in batch:
            states[client] |= zip(texts, islice(rows, len(texts)), strict=True)
    return [torch.stack([of_client[at] for at in range(len(of_client))]) for of_client in states]


def shares_of(group: Group, prompts: Sequence[Sequence[Ids]], size: int) -> Shares | None:
    """The weights of the slots for each prompt, where the plan wants them."""
    combine = group.plan.combine if group.servings else None
    if not isinstance(combine, Similarity):
        return None
    slot = group.plan.slots[combine.embeds]
    alone = [
        Serving(single(slot), trees.select(serving.tree, slot.name, HEAD))
        for serving in group.servings
    ]
    shares = []
    embedded = embedded_by(Group(group.base, alone), prompts, size)
    for serving, seen in zip(group.servings, embedded, strict=True):
        assert serving.references is not None
        known = functional.normalize(serving.references.float(), dim=-1)
        likeness = (functional.normalize(seen, dim=-1) @ known.T).mean(1)
        weights = torch.zeros(len(seen), 2)
        weights[:, combine.on] = combine.scale * likeness
        weights[:, 1 - combine.on] = 1 - combine.scale * likeness
        shares.append(weights)
    return shares


def sizes_of(texts: Sequence[Sequence[Ids]]) -> list[list[int]]:
    """Tokens of each text of each client."""
    return [[len(ids) for ids in of_client] for of_client in texts]


def _text_of_tokens(packing: Packing) -> Tensor:
    """Which text each token of a packed row belongs to."""
    return (packing.positions[0] == 0).cumsum(0).cpu() - 1
