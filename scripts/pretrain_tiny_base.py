"""Pretrain the tiny Llama base model that ships with fedalt, on a CPU and within a time budget."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
import math
import platform
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

LOG = logging.getLogger("pretrain_tiny_base")

EOS = "<|endoftext|>"
PAD = "<|pad|>"
EOS_ID = 0
PAD_ID = 1
PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PROMPT_WITH_CONTEXT = "### Instruction:\n{instruction}\n\n{context}\n\n### Response:\n"
SIZE_LIMIT = 10_000_000
# Below this many remaining context tokens a shortened context would not be worth quoting from.
MIN_CONTEXT_TOKENS = 32
# Bump this when the preparation of the data changes, so that stale caches are not reused.
CACHE_VERSION = 1

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Row:
    """One instruction example, its fields stripped of surrounding whitespace."""

    instruction: str
    context: str
    output: str

    def render(self, context: str | None = None) -> str:
        """Return prompt and response as text, optionally with another context."""
        shown = self.context if context is None else context
        template = PROMPT_WITH_CONTEXT if shown else PROMPT
        return template.format(instruction=self.instruction, context=shown) + self.output


@dataclass(frozen=True)
class Corpus:
    """Tokenised training and held-out text."""

    books: Tokens
    rows: list[Tokens]
    context_rows: list[int]
    held_books: list[Tokens]
    held_rows: list[Tokens]


@dataclass(frozen=True)
class Earlier:
    """What the card of an interrupted run says about it."""

    steps: int
    tokens_seen: int
    book_tokens: int
    instruction_tokens: int
    repeat_tokens: int
    minutes: float
    budget_minutes: float
    threads: int


@dataclass
class Report:
    """The measured figures that end up in the model card."""

    parameters: int = 0
    steps: int = 0
    tokens_seen: int = 0
    book_tokens: int = 0
    instruction_tokens: int = 0
    repeat_tokens: int = 0
    minutes: float = 0.0
    budget_minutes: float = 0.0
    threads: int = 0
    compiled: bool = False
    precision: str = "fp32"
    finished: bool = False
    prompt: str = ""
    sample: str = ""
    bytes_on_disk: int = 0


@dataclass(frozen=True)
class Score:
    """Held-out loss in nats per token and in bits per byte."""

    nats: float
    bits_per_byte: float
    tokens: int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--corpus",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"folder of *.txt.gz files; books are separated by a line holding {EOS}",
    )
    data.add_argument(
        "--instructions",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON-lines files with the fields instruction, context and output",
    )
    data.add_argument("--cache", type=Path, help="folder for tokenised text (default: temporary)")
    data.add_argument(
        "--instruction-share", type=float, default=0.25, help="share of instruction sequences"
    )
    data.add_argument(
        "--repeat-share",
        type=float,
        default=0.05,
        help="share of sequences that repeat one book excerpt, which teaches copying",
    )
    data.add_argument("--held-books", type=int, default=4, help="books kept out of training")
    data.add_argument("--held-rows", type=int, default=300, help="instructions kept out")
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, required=True, metavar="DIR", help="model folder to write")
    out.add_argument("--log", type=Path, metavar="FILE", help="also write the log to this file")
    shape = parser.add_argument_group("model")
    shape.add_argument("--hidden", type=int, default=256, help="hidden size")
    shape.add_argument("--layers", type=int, default=4, help="number of layers")
    shape.add_argument("--heads", type=int, default=4, help="attention heads")
    shape.add_argument("--intermediate", type=int, default=640, help="width of the MLP")
    shape.add_argument("--vocab", type=int, default=4096, help="size of the byte-level BPE")
    train = parser.add_argument_group("training")
    train.add_argument("--minutes", type=float, default=66.0, help="budget for the whole run")
    train.add_argument("--length", type=int, default=256, help="tokens in one sequence")
    train.add_argument("--batch", type=int, default=24, help="sequences in one step")
    train.add_argument("--muon-lr", type=float, default=0.02, help="peak rate for matrices")
    train.add_argument("--adam-lr", type=float, default=3e-3, help="peak rate for all else")
    train.add_argument("--weight-decay", type=float, default=0.05, help="decay of the matrices")
    train.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="arithmetic of forward and backward passes; auto: bf16 if the CPU has it",
    )
    train.add_argument("--threads", type=int, default=2, help="CPU threads")
    train.add_argument("--seed", type=int, default=0, help="seed of weights and data order")
    train.add_argument(
        "--continue-from",
        type=Path,
        metavar="DIR",
        help="model folder of an interrupted run whose weights to go on from",
    )
    train.add_argument("--no-compile", action="store_true", help="do not try torch.compile")
    train.add_argument("--eval-minutes", type=float, default=5.0, help="minutes between scores")
    train.add_argument("--save-minutes", type=float, default=10.0, help="minutes between saves")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------- data


def read_books(folder: Path) -> list[str]:
    """Return the books found in the compressed text files of a folder."""
    books: list[str] = []
    for path in sorted(folder.glob("*.txt.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as handle:
            lines: list[str] = []
            for line in handle:
                if line.strip() == EOS:
                    books.append("".join(lines).strip())
                    lines = []
                else:
                    lines.append(line)
            books.append("".join(lines).strip())
    found = [book for book in books if book]
    if not found:
        raise SystemExit(f"no books in {folder}/*.txt.gz")
    return found


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """Return the instruction rows of JSON-lines files, without those lacking a response."""
    rows: list[Row] = []
    for path in paths:
        with path.open(encoding="utf-8") as handle:
            for line in handle:
                if not line.strip():
                    continue
                raw = json.loads(line)
                row = Row(
                    instruction=str(raw["instruction"]).strip(),
                    context=str(raw.get("context") or "").strip(),
                    output=str(raw["output"]).strip(),
                )
                if row.instruction and row.output:
                    rows.append(row)
    if not rows:
        raise SystemExit("no instruction rows")
    return rows


def train_tokenizer(texts: Iterator[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE with the two special tokens at ids 0 and 1."""
    tokenizer = Tokenizer(models.BPE())
    # Single digits keep numbers compositional, which a vocabulary this small cannot memorise.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.token_to_id(EOS) != EOS_ID or tokenizer.token_to_id(PAD) != PAD_ID:
        raise RuntimeError("the special tokens did not get the expected ids")
    return tokenizer


def paragraphs(book: str, size: int = 20_000) -> Iterator[str]:
    """Yield a book in pieces of about `size` characters, cut before paragraph breaks."""
    start = 0
    while start < len(book):
        end = book.find("\n\n", start + size)
        end = len(book) if end < 0 else end
        yield book[start:end]
        start = end


def encode_book(tokenizer: Tokenizer, book: str) -> Tokens:
    """Return the tokens of one book, ended by the end-of-text token."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(list(paragraphs(book)), add_special_tokens=False):
        ids.extend(encoding.ids)
    ids.append(EOS_ID)
    return np.asarray(ids, dtype=np.uint16)


def encode_row(tokenizer: Tokenizer, row: Row, limit: int) -> tuple[Tokens, bool]:
    """Return the tokens of a row and whether its context and response fit in `limit` tokens.

    A context that is too long loses its end, so that the response, which mostly quotes the
    beginning of the context, still stands in the same sequence.
    """
    ids = tokenizer.encode(row.render(), add_special_tokens=False).ids
    excess = len(ids) + 1 - limit
    if row.context and excess > 0:
        context = tokenizer.encode(row.context, add_special_tokens=False)
        kept = len(context.ids) - excess - 4
        if kept >= MIN_CONTEXT_TOKENS:
            cut = row.context[: context.offsets[kept][1]].rsplit(maxsplit=1)[0]
            ids = tokenizer.encode(row.render(cut), add_special_tokens=False).ids
    fits = bool(row.context) and len(ids) + 1 <= limit
    return np.asarray([*ids, EOS_ID], dtype=np.uint16), fits


def cache_key(args: argparse.Namespace) -> str:
    """Return a name that changes whenever the prepared data would."""
    files = [*sorted(args.corpus.glob("*.txt.gz")), *args.instructions]
    facts = [f"{path.name}:{path.stat().st_size}" for path in files]
    options = [args.vocab, args.length, args.held_books, args.held_rows, args.seed]
    return hashlib.sha256(repr([CACHE_VERSION, facts, options]).encode()).hexdigest()[:16]


def pack(arrays: Sequence[Tokens]) -> tuple[Tokens, npt.NDArray[np.int64]]:
    """Join arrays into one, with the lengths needed to split it again."""
    return np.concatenate(arrays), np.asarray([len(array) for array in arrays], dtype=np.int64)


def unpack(flat: Tokens, lengths: npt.NDArray[np.int64]) -> list[Tokens]:
    """Undo `pack`."""
    return np.split(flat, np.cumsum(lengths)[:-1])


def prepare(args: argparse.Namespace) -> tuple[Tokenizer, Corpus]:
    """Train the tokenizer and tokenise everything, or read both from the cache."""
    root = args.cache or Path(tempfile.gettempdir()) / "fedalt-pretrain-cache"
    folder = root / cache_key(args)
    if not (folder / "tokens.npz").exists():
        build_cache(args, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with np.load(folder / "tokens.npz") as stored:
        corpus = Corpus(
            books=stored["books"],
            rows=unpack(stored["rows"], stored["rows_len"]),
            context_rows=[int(index) for index in stored["context_rows"]],
            held_books=unpack(stored["held_books"], stored["held_books_len"]),
            held_rows=unpack(stored["held_rows"], stored["held_rows_len"]),
        )
    LOG.info(
        "data: %.2f M book tokens, %d instructions (%.2f M tokens, %d with a fitting context); "
        "held out: %d books, %d instructions",
        len(corpus.books) / 1e6,
        len(corpus.rows),
        sum(len(row) for row in corpus.rows) / 1e6,
        len(corpus.context_rows),
        len(corpus.held_books),
        len(corpus.held_rows),
    )
    return tokenizer, corpus


def build_cache(args: argparse.Namespace, folder: Path) -> None:
    """Write tokenizer and tokens to the cache folder."""
    started = time.monotonic()
    rng = random.Random(args.seed)
    books = read_books(args.corpus)
    rows = read_rows(args.instructions)
    rng.shuffle(books)
    rng.shuffle(rows)
    # Whole books are held out: a held-out chapter of a training book would flatter the loss.
    held_books, books = books[: args.held_books], books[args.held_books :]
    held_rows, rows = rows[: args.held_rows], rows[args.held_rows :]
    if not books or not rows:
        raise SystemExit("nothing left to train on: hold out less")

    def sample() -> Iterator[str]:
        """Yield about a third of the books and all instructions."""
        for book in books:
            yield from list(paragraphs(book))[::3]
        for row in rows:
            yield row.render()

    tokenizer = train_tokenizer(sample(), args.vocab)
    LOG.info("tokenizer: %d tokens, %.0f s", tokenizer.get_vocab_size(), time.monotonic() - started)
    limit = args.length + 1
    encoded = [encode_row(tokenizer, row, limit) for row in rows]
    arrays: dict[str, npt.NDArray[Any]] = {
        "books": np.concatenate([encode_book(tokenizer, book) for book in books]),
        "context_rows": np.flatnonzero([fits for _, fits in encoded]),
    }
    for name, parts in (
        ("rows", [ids for ids, _ in encoded]),
        ("held_books", [encode_book(tokenizer, book) for book in held_books]),
        ("held_rows", [encode_row(tokenizer, row, limit)[0] for row in held_rows]),
    ):
        arrays[name], arrays[f"{name}_len"] = pack(parts)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    partial = folder / "partial.npz"
    np.savez(partial, **arrays)  # type: ignore[arg-type]  # the stub sees allow_pickle in them
    partial.replace(folder / "tokens.npz")
    LOG.info("tokenised in %.0f s", time.monotonic() - started)


def forever(items: Sequence[int], rng: random.Random) -> Iterator[int]:
    """Yield the items in a new random order per epoch, without end."""
    order = list(items)
    if not order:
        raise SystemExit("the corpus is too small: its books have less than two sequences")
    while True:
        rng.shuffle(order)
        yield from order


class Batches:
    """Draws sequences of three kinds: book excerpts, instructions, repeated excerpts."""

    def __init__(self, corpus: Corpus, args: argparse.Namespace) -> None:
        self.corpus = corpus
        self.size = args.batch
        self.window = args.length + 1
        self.instruction_share = args.instruction_share
        self.repeat_share = args.repeat_share
        self.counts = {"books": 0, "instructions": 0, "repeats": 0}
        # A continued run draws anew, or it would see what it has seen in the same order.
        self.rng = random.Random(args.seed + (1000 if args.continue_from else 1))
        starts = range(0, len(corpus.books) - 2 * self.window, self.window)
        self.starts = forever(starts, self.rng)
        # Rows with a context that fits come twice, because they teach quoting from the prompt.
        self.rows = forever([*range(len(corpus.rows)), *corpus.context_rows], self.rng)

    def excerpt(self) -> Tokens:
        """Return one window of book text; the random shift makes every epoch differ."""
        start = next(self.starts) + self.rng.randrange(self.window)
        return self.corpus.books[start : start + self.window]

    def instructions(self) -> Tokens:
        """Return whole instructions one after the other, the first at the window's start.

        Prompts at inference time begin at position zero, too.
        """
        parts: list[Tokens] = []
        total = 0
        while total < self.window:
            parts.append(self.corpus.rows[next(self.rows)])
            total += len(parts[-1])
        return np.concatenate(parts)[: self.window]

    def repeated(self) -> Tokens:
        """Return an excerpt of random length, repeated until the window is full."""
        source = self.excerpt()
        span = source[: self.rng.randrange(16, self.window // 2)]
        return np.resize(span, self.window)

    def draw(self) -> Tensor:
        """Return the next batch, of shape (sequences, length + 1)."""
        chosen: list[Tokens] = []
        for _ in range(self.size):
            dice = self.rng.random()
            if dice < self.instruction_share:
                kind, tokens = "instructions", self.instructions()
            elif dice < self.instruction_share + self.repeat_share:
                kind, tokens = "repeats", self.repeated()
            else:
                kind, tokens = "books", self.excerpt()
            self.counts[kind] += self.window - 1
            chosen.append(tokens)
        return torch.from_numpy(np.stack(chosen).astype(np.int64))


# ----------------------------------------------------------------------------------- training


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of a stack of matrices towards one (Newton-Schulz, fp32)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    norm: Tensor = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (norm + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, in fp32: bf16 is emulated on many CPUs."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.0
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all matrices; equal shapes are handled in one batched product."""
        del closure  # the interface has it; the gradients are there already
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    shapes.setdefault(param.shape, []).append((param, param.grad))
            for shape, pairs in shapes.items():
                updates = []
                for param, grad in pairs:
                    state = self.state[param]
                    if not state:
                        state["momentum"] = torch.zeros_like(param)
                    state["momentum"].lerp_(grad, 1 - group["momentum"])
                    updates.append(grad.lerp(state["momentum"], group["momentum"]))
                scale = math.sqrt(max(1.0, shape[0] / shape[1]))
                updates = list(orthogonalise(torch.stack(updates)))
                for (param, _), update in zip(pairs, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["decay"])
                    param.add_(update, alpha=-group["lr"] * scale)


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Return a freshly initialised model."""
    if args.continue_from:
        return LlamaForCausalLM.from_pretrained(args.continue_from, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    return model


def read_earlier(folder: Path) -> Earlier:
    """Return the figures of an interrupted run from the card beside its weights."""
    card = (folder / "README.md").read_text(encoding="utf-8")

    def figures(pattern: str) -> list[float]:
        """Return the numbers that a pattern captures in the card."""
        match = re.search(pattern, card)
        if match is None:
            raise SystemExit(f"the card in {folder} does not tell what its run has seen")
        return [float(group.replace(",", "")) for group in match.groups()]

    tokens, steps = figures(r"\| Tokens seen \| ([\d,]+) in ([\d,]+) steps")
    (books,) = figures(r"\| of which book text \| ([\d,]+)")
    (instructions,) = figures(r"\| of which instructions \| ([\d,]+)")
    (repeats,) = figures(r"\| of which repeated book excerpts \| ([\d,]+)")
    minutes, budget = figures(r"\| Time \| ([\d.]+) minutes.*\(budget ([\d.]+)\)")
    (threads,) = figures(r"\| Machine \| .*threads: (\d+)")
    return Earlier(
        steps=int(steps),
        tokens_seen=int(tokens),
        book_tokens=int(books),
        instruction_tokens=int(instructions),
        repeat_tokens=int(repeats),
        minutes=minutes,
        budget_minutes=budget,
        threads=int(threads),
    )


def build_optimizers(
    model: LlamaForCausalLM, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers and AdamW for everything else."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, param in model.named_parameters():
        inside = ".layers." in name and param.ndim == 2
        (matrices if inside else others).append(param)
    return [
        Muon(matrices, lr=args.muon_lr, decay=args.weight_decay),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(progress: float) -> float:
    """Return the factor on the learning rate: short warm-up, flat, linear over the last half."""
    if progress < 0.02:
        return max(progress / 0.02, 0.02)
    return min(1.0, max(0.0, 2.0 * (1.0 - progress)))


def token_losses(model: nn.Module, window: Tensor) -> Tensor:
    """Return the loss of every predicted token of a batch of windows."""
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), window[:, 1:].flatten(), reduction="none"
    ).view(window.size(0), -1)


def use_bf16(choice: str) -> bool:
    """Return whether to compute in bf16, which without hardware support is far slower."""
    if choice != "auto":
        return choice == "bf16"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def compile_step(
    model: LlamaForCausalLM, args: argparse.Namespace
) -> tuple[Callable[[Tensor], Tensor], bool]:
    """Return the loss function, compiled where that works, and whether it is compiled."""
    bf16 = use_bf16(args.precision)

    def eager(window: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return token_losses(model, window).mean()

    if args.no_compile:
        return eager, False
    try:
        compiled: Callable[[Tensor], Tensor] = torch.compile(eager, dynamic=False)
        probe = torch.zeros(args.batch, args.length + 1, dtype=torch.int64)
        compiled(probe).backward()
        model.zero_grad(set_to_none=True)
        return compiled, True
    except Exception as error:  # whatever is wrong with the toolchain, eager still works
        LOG.warning("torch.compile does not work here, training eagerly: %s", error)
        model.zero_grad(set_to_none=True)
        return eager, False


# --------------------------------------------------------------------------------- evaluation


class HeldOut:
    """Held-out windows of three kinds, and the number of bytes behind every token."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, length: int, seed: int) -> None:
        window = length + 1
        rng = random.Random(seed + 2)
        excerpts = [
            book[start : start + window]
            for book in corpus.held_books
            for start in range(0, len(book) - window, window)
        ]
        rng.shuffle(excerpts)
        rows = [row[:window] for row in corpus.held_rows]
        half = window // 2
        self.sets: dict[str, list[Tokens]] = {
            "books": excerpts[:256],
            "instructions": rows,
            "repeated": [np.resize(excerpt[:half], window) for excerpt in excerpts[256:320]],
        }
        # The first occurrence of a repeated span is ordinary text: only the second is scored.
        self.first = {"books": 0, "instructions": 0, "repeated": half}
        # The vocabulary spells each byte as one character, so lengths of names are byte counts.
        names = (tokenizer.id_to_token(index) or "" for index in range(tokenizer.get_vocab_size()))
        self.bytes = torch.tensor([0 if name in (EOS, PAD) else len(name) for name in names])

    @torch.no_grad()
    def score(self, model: nn.Module, share: float = 1.0) -> dict[str, Score]:
        """Return the loss on a share of every set."""
        model.eval()
        scores: dict[str, Score] = {}
        for kind, windows in self.sets.items():
            chosen = windows[: max(1, int(len(windows) * share))]
            nats, tokens, size = 0.0, 0, 0
            for start in range(0, len(chosen), 16):
                part = chosen[start : start + 16]
                lengths = torch.tensor([len(window) for window in part])
                batch = torch.full((len(part), int(lengths.max())), PAD_ID)
                for index, window in enumerate(part):
                    batch[index, : len(window)] = torch.from_numpy(window.astype(np.int64))
                positions = torch.arange(1, batch.size(1))
                scored = (positions < lengths[:, None]) & (positions >= self.first[kind])
                nats += float(token_losses(model, batch)[scored].sum())
                tokens += int(scored.sum())
                size += int(self.bytes[batch[:, 1:]][scored].sum())
            bits = nats / math.log(2) / max(size, 1)
            scores[kind] = Score(nats=nats / max(tokens, 1), bits_per_byte=bits, tokens=tokens)
        model.train()
        return scores


def describe(scores: dict[str, Score]) -> str:
    """Return scores on one line for the log."""
    return ", ".join(
        f"{kind} {score.nats:.3f} nats ({score.bits_per_byte:.3f} bits/byte)"
        for kind, score in scores.items()
    )


# ------------------------------------------------------------------------------------- output

CARD = """\
---
license: cc-by-sa-3.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
datasets:
- databricks/databricks-dolly-15k
- mlschmitt/classic-books-markdown
---

# fedalt tiny base

A Llama with {parameters:,} parameters, trained from scratch on a CPU for {minutes:.1f} minutes.
It is the offline default of fedalt's demonstration and tests: small enough to ship in the
package, large enough for LoRA fine-tuning to have something to adapt. **It is not a useful
language model**: its text is mostly grammatical and mostly meaningless, it states falsehoods,
and it has had no safety training. Do not use it for anything but trying out the software.
{unfinished}
## Model

| | |
|---|---|
| Architecture | `LlamaForCausalLM`, tied embeddings, stored as bf16 |
| Parameters | {parameters:,} |
| Hidden size, layers, heads, MLP | {hidden}, {layers}, {heads}, {intermediate} |
| Vocabulary | {vocab:,}, byte-level BPE with single digits |
| Positions | trained at {length} tokens; the configuration allows 1,024, where it is worse |
| Size on disk | {bytes_on_disk:,} bytes, tokenizer included |

The special tokens are `{eos}` (both bos and eos) and `{pad}`; encoding adds none by itself.

## Training

| | |
|---|---|
| Tokens seen | {tokens_seen:,} in {steps:,} steps of {batch} sequences |
| of which book text | {book_tokens:,} ({book_epochs:.2f} passes) |
| of which instructions | {instruction_tokens:,} |
| of which repeated book excerpts | {repeat_tokens:,} |
| Time | {minutes:.1f} minutes, everything included (budget {budget_minutes:g}) |
| Machine | {machine}, no accelerator, threads: {threads} |
| Software | PyTorch {torch}, Transformers {transformers}, torch.compile {compiled} |
| Precision | {precision} passes over fp32 weights; stored as bf16 |
| Optimiser | Muon (fp32 Newton-Schulz) at {muon_lr:g} for matrices, AdamW at {adam_lr:g} else |
| Schedule | by elapsed time: 2 % warm-up, flat, linear to zero over the second half |
| Seed | {seed} (the time budget makes runs repeatable in kind, not bit for bit) |
{continued}
The loss counts every token, prompts included. Instructions whose context does not fit in one
sequence lose the end of the context; those with a fitting context come twice, and a few
sequences repeat one excerpt, so that the model learns to copy from what stands before.

## Held-out loss

Measured on the stored weights. The books and instructions below were not trained on:
{held_books} whole books and {held_rows} instructions drawn at random. "Repeated" scores the
second occurrence of a book excerpt that the model has just read, and so tells how well it copies.

| text | nats per token | bits per byte | tokens |
|---|---|---|---|
{scores}

## Sample

The prompt is one that fedalt's default template produces; decoding is greedy with a
repetition penalty of 1.2.

```text
{prompt}{sample}
```

## Prompt template

The instructions were rendered exactly so, followed by the response and `{eos}`:

```text
### Instruction:
{{instruction}}

{{context}}

### Response:
```

Without a context, its paragraph and the blank line after it are left out.

## Data and licence

- Books in the public domain, according to their collection `mlschmitt/classic-books-markdown`.
- [databricks-dolly-15k](https://huggingface.co/datasets/databricks/databricks-dolly-15k) by
  Databricks, Inc., CC BY-SA 3.0; parts of its contexts come from Wikipedia.

The weights are released under
[CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/), to respect Dolly's
share-alike condition. The licence of fedalt's code is another matter and is not touched by this.

Because the base has seen Dolly's training rows, federated fine-tuning on those same rows starts
from a model that knows them: compare methods on them, but do not read the level of the
loss as what an unseen data set would give.

## Rebuild

```sh
{command}
```
{rebuild}
CORPUS_DIR holds `*.txt.gz` files of books separated by lines `{eos}`; INSTRUCTIONS is a
JSON-lines file with the fields `instruction`, `context` and `output`.
"""


CONTINUED = """
These are the figures of two runs together. The first was interrupted; its last checkpoint came
after {first.minutes:.1f} minutes, {first.tokens_seen:,} tokens and {first.steps:,} steps
(threads: {first_threads}), and what followed it is lost and not counted. The second went on from
that checkpoint, stored as bf16, for {second.minutes:.1f} minutes, {second.tokens_seen:,} tokens
and {second.steps:,} steps (threads: {second_threads}): with a fresh state of the optimisers, the
whole schedule once more, another order of the same training data and the same held-out text.
"""

REBUILD_CONTINUED = """
CHECKPOINT_DIR is the model folder that a first run left behind: the same command without
`--continue-from`, with `--minutes {first.budget_minutes:g} --threads {first.threads}`, stopped
after {first.minutes:.1f} minutes. Letting one run go on to its end makes a model of the same kind.
"""


def changed_options(args: argparse.Namespace) -> str:
    """Return the options that shaped the model and differ from their defaults."""
    plain = vars(parse_args(["--corpus", "x", "--instructions", "x", "--out", "x"]))
    shown = {"continue_from", "corpus", "instructions", "out", "minutes", "seed"}
    places = {"cache", "log", "eval_minutes", "save_minutes"}
    parts: list[str] = []
    for name, value in vars(args).items():
        if name not in shown | places and value != plain[name]:
            flag = "--" + name.replace("_", "-")
            parts.append(flag if value is True else f"{flag} {value}")
    return "".join(f" {part}" for part in parts)


def write_card(
    folder: Path,
    report: Report,
    scores: dict[str, Score],
    corpus: Corpus,
    args: argparse.Namespace,
    earlier: Earlier | None = None,
) -> None:
    """Write the model card with the measured figures, those of an earlier part included."""
    import transformers

    labels = {"books": "Books", "instructions": "Instructions", "repeated": "Repeated"}
    lines = [
        f"| {labels[kind]} | {score.nats:.3f} | {score.bits_per_byte:.3f} | {score.tokens:,} |"
        for kind, score in scores.items()
    ]
    unfinished = (
        ""
        if report.finished
        else "\nThis is a checkpoint of a run that has not ended (yet): expect worse figures.\n"
    )
    command = (
        "python scripts/pretrain_tiny_base.py --corpus CORPUS_DIR --instructions INSTRUCTIONS \\\n"
        f"    --out OUT_DIR --minutes {args.minutes:g} --seed {args.seed}{changed_options(args)}"
    )
    figures = {**asdict(report), "compiled": "on" if report.compiled else "off"}
    continued, rebuild = "", ""
    if earlier is not None:
        # The totals describe the weights; the part of either run is told apart below them.
        for name, value in asdict(earlier).items():
            if name != "threads":
                figures[name] += value
        continued = CONTINUED.format(
            first=earlier,
            second=report,
            first_threads=earlier.threads,
            second_threads=report.threads,
        )
        command += " \\\n    --continue-from CHECKPOINT_DIR"
        rebuild = REBUILD_CONTINUED.format(first=earlier)
    text = CARD.format(
        **figures,
        unfinished=unfinished,
        hidden=args.hidden,
        layers=args.layers,
        heads=args.heads,
        intermediate=args.intermediate,
        vocab=args.vocab,
        length=args.length,
        batch=args.batch,
        muon_lr=args.muon_lr,
        adam_lr=args.adam_lr,
        seed=args.seed,
        eos=EOS,
        pad=PAD,
        continued=continued,
        rebuild=rebuild,
        book_epochs=figures["book_tokens"] / len(corpus.books),
        held_books=len(corpus.held_books),
        held_rows=len(corpus.held_rows),
        machine=platform.machine(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        scores="\n".join(lines),
        command=command,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def generate(model: LlamaForCausalLM, tokenizer: Any, prompt: str) -> str:
    """Return a greedy continuation of a prompt."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    model.eval()
    with torch.no_grad():
        result = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=64,
            do_sample=False,
            repetition_penalty=1.2,
        )
    return str(tokenizer.decode(result[0, ids.size(1) :], skip_special_tokens=True)).strip()


def check_tokenizer(loaded: Any, tokenizer: Tokenizer) -> None:
    """Fail unless the reloaded tokenizer behaves as the one that training used."""
    probe = PROMPT.format(instruction="In 1923, naïve “Émile” said:\n  hello?") + f"Yes.{EOS}"
    expected = tokenizer.encode(probe, add_special_tokens=False).ids
    if loaded(probe).input_ids != expected:
        raise RuntimeError("the saved tokenizer encodes differently")
    if loaded.decode(expected) != probe:
        raise RuntimeError("the saved tokenizer does not give the text back")
    if (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) != (EOS_ID, EOS_ID, PAD_ID):
        raise RuntimeError("the saved tokenizer lost its special tokens")


def folder_size(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def swap(new: Path, out: Path) -> None:
    """Put a complete new folder in the place of the old one."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def save(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    held: HeldOut,
    report: Report,
    corpus: Corpus,
    args: argparse.Namespace,
    started: float,
    earlier: Earlier | None = None,
) -> None:
    """Write the model in bf16, check what was written, describe it, and move it into place."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    folder = args.out.with_name(f".{args.out.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    # Weights come out readable by their owner alone, which no package should ship.
    for path in folder.iterdir():
        path.chmod(0o644)
    # Transformers 5 records a class name that version 4 does not know; both know this one.
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    stored = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    check_tokenizer(loaded, tokenizer)
    scores = held.score(stored, 1.0 if report.finished else 0.25)
    report.prompt = PROMPT.format(instruction="What is the capital of France?")
    report.sample = generate(stored, loaded, report.prompt)
    report.minutes = (time.monotonic() - started) / 60
    # The card's own length depends on this figure; a second writing settles it.
    for _ in range(3):
        write_card(folder, report, scores, corpus, args, earlier)
        report.bytes_on_disk = folder_size(folder)
    if report.bytes_on_disk > SIZE_LIMIT:
        raise RuntimeError(f"{report.bytes_on_disk} bytes are over the limit of {SIZE_LIMIT}")
    swap(folder, args.out)
    LOG.info("saved %s (%d bytes): %s", args.out, report.bytes_on_disk, describe(scores))
    LOG.info("sample: %r", report.sample)


# --------------------------------------------------------------------------------------- main


def train(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    corpus: Corpus,
    args: argparse.Namespace,
    started: float,
) -> None:
    """Train until the budget is spent, with scores and checkpoints on the way."""
    report = Report(
        parameters=sum(param.numel() for param in model.parameters()),
        budget_minutes=args.minutes,
        threads=args.threads,
    )
    # Read now: saving to the same folder will replace the card.
    earlier = read_earlier(args.continue_from) if args.continue_from else None
    LOG.info("model: %d parameters", report.parameters)
    held = HeldOut(corpus, tokenizer, args.length, args.seed)
    batches = Batches(corpus, args)
    optimizers = build_optimizers(model, args)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    model.train()
    loss_of, report.compiled = compile_step(model, args)
    report.precision = "bf16" if use_bf16(args.precision) else "fp32"
    LOG.info("ready to train, compiled: %s, %s", report.compiled, report.precision)

    def count() -> None:
        """Copy the counters of the data into the report."""
        report.book_tokens = batches.counts["books"]
        report.instruction_tokens = batches.counts["instructions"]
        report.repeat_tokens = batches.counts["repeats"]
        report.tokens_seen = sum(batches.counts.values())

    begun = time.monotonic()
    # The last saving scores everything, which on a busy machine takes a minute.
    deadline = started + 60 * args.minutes - min(80.0, 6.0 * args.minutes)
    next_log, next_eval, next_save = (
        begun + gap for gap in (15.0, 60 * args.eval_minutes, 60 * args.save_minutes)
    )
    recent: list[float] = []
    logged_at, logged_tokens = begun, 0
    while (now := time.monotonic()) < deadline:
        progress = (now - begun) / (deadline - begun)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate(progress)
        loss = loss_of(batches.draw())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        report.steps += 1
        recent.append(float(loss.detach()))
        if not math.isfinite(recent[-1]):
            raise RuntimeError(f"the loss is not finite at step {report.steps}: lower the rates")
        now = time.monotonic()
        if now >= next_log:
            count()
            LOG.info(
                "step %d, %.1f %%, loss %.3f, %.2f M tokens, %.0f tokens/s, rate %.3f",
                report.steps,
                100 * progress,
                sum(recent) / len(recent),
                report.tokens_seen / 1e6,
                (report.tokens_seen - logged_tokens) / (now - logged_at),
                rate(progress),
            )
            recent, logged_at, logged_tokens = [], now, report.tokens_seen
            next_log = now + 30
        if now >= next_eval:
            LOG.info("held out: %s", describe(held.score(model, 0.25)))
            next_eval = now + 60 * args.eval_minutes
        if now >= next_save and now < deadline - 120:
            count()
            save(model, tokenizer, held, report, corpus, args, started, earlier)
            next_save = now + 60 * args.save_minutes
    count()
    report.finished = True
    save(model, tokenizer, held, report, corpus, args, started, earlier)
    LOG.info("done: %s", json.dumps(asdict(report)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pretraining."""
    started = time.monotonic()
    args = parse_args(argv)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if args.log:
        args.log.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(args.log, encoding="utf-8"))
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers, force=True
    )
    for name in ("httpx", "transformers", "torch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Progress bars of loading and saving would only clutter the log.
    disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    tokenizer, corpus = prepare(args)
    model = build_model(args)
    train(model, tokenizer, corpus, args, started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
