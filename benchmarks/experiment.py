"""A whole federated experiment, evaluation included: this package, the papers' way, and Flower.

    python benchmarks/experiment.py --flower-python OTHER/bin/python     # every variant, 3 turns
    python benchmarks/experiment.py --size 5M --clients 2 --rounds 1 --turns 1    # a quick try

8 clients train 5 rounds of one epoch, then their test texts are scored: the loss and, with
`--answers 80`, answers of at most so many tokens with 4 beams. Random weights; 32 texts to train on
and 16 to test, of 40 to 160 tokens, the last 15 % of which are the answer; in batches of 8. The
size smollm2 is SmolLM2-135M-Instruct (`make smollm2`), whose tokens are words here as well.
Each variant is a process of its own, in turns (A B C A B C ..):

    fedalt     FedALT with this package, as its commands run it
    reference  FedALT as it is usually published: the base is loaded anew for each client and round,
               slot by slot, padded batches in random order, all logits, states as files, answers
               to two texts at a time
    trainer    FedIT, a plainer method: PEFT's LoRA and one transformers Trainer for each client
               and round, the base loaded once, answers to 8 texts at a time; see trainer_fedit.py
    flower     FedIT with FedAvg in Flower's simulation, as many clients at once as there are
               cores; see flower_fedit.py

`--flower-python` is an interpreter with `flwr[simulation]` and peft, which need not know this
package; without it the variant is left out. Threads are what torch, and Ray, choose by themselves.

Printed are medians: seconds from the process's start to its end, imports included; the most memory
of all its processes together (shared pages once, ten samples a second, Linux only); the clients'
mean test loss. The first two do the same job with other draws (starts, order, dropout), so their
losses agree to about 1 %; the others train one adapter for all. This package also scores what the
clients share, so that its evaluation is twice that of the others, and compares answers with what
was wanted. `bound` are the seconds that training alone takes at this machine's rate of matmuls, if
only what no step can do without is computed (see step.py): nothing can be faster.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from document import table, write
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from watch import Watch

SIZES = ("5M", "40M", "smollm2")  # see step_variants.py
VARIANTS = ("fedalt", "reference", "trainer", "flower")
RANK, ALPHA, DROPOUT = 8, 32.0, 0.05
SITES = ["q_proj", "v_proj"]
LR, WEIGHT_DECAY, CLIP, BATCH = 1e-3, 0.05, 1.0, 8  # with 3e-4 little is learnt in 20 steps
BEAMS = 4
TEXTS = {"train": 32, "test": 16}
ANSWERS = 16  # different words in a client's answers: something that can be learnt
SPECIAL = ["<pad>", "</s>", "<unk>"]
HERE = Path(__file__).resolve().parent
Text = tuple[list[int], int]  # token ids, and where the answer begins


def write_model(folder: Path, size: str) -> int:
    """A base model and a tokenizer of whole words, as many as are returned."""
    from step_variants import model_of  # not in Flower's interpreter, which may lack this package

    model = model_of(size)
    model.save_pretrained(folder)
    count: int = model.config.vocab_size - len(SPECIAL)
    words = [*SPECIAL, *(f"w{n}" for n in range(count))]
    vocabulary = {word: at for at, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return count


def write_clients(folder: Path, count: int, words: int) -> None:
    """Texts of random words; every client answers with a few words of its own."""
    folder.mkdir()
    stream = random.Random(1)

    def draw(first: int, end: int, count: int) -> str:
        return " ".join(f"w{stream.randrange(first, end)}" for _ in range(count))

    for client in range(count):
        for split, texts in TEXTS.items():
            lines = []
            for _ in range(texts):
                length = stream.randint(40, 160)
                answer = round(0.15 * length)  # its last token ends the text
                own = draw(client * ANSWERS, (client + 1) * ANSWERS, answer - 1)
                lines.append({"prompt": draw(0, words, length - answer), "completion": own})
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"client-{client:02d}.{split}.jsonl").write_text(text)


def clients_of(folder: Path) -> list[str]:
    """The names of the clients that have data."""
    return sorted(path.name.split(".")[0] for path in (folder / "data").glob("*.train.jsonl"))


@cache
def tokenizer_of(folder: Path) -> Any:
    """The tokenizer beside the base model."""
    return AutoTokenizer.from_pretrained(folder / "model")


def texts_of(folder: Path, client: str, split: str) -> list[Text]:
    """A client's texts as token ids."""
    tokenizer = tokenizer_of(folder)
    texts = []
    for line in (folder / "data" / f"{client}.{split}.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt, answer = (tokenizer(record[key]).input_ids for key in ("prompt", "completion"))
        texts.append(([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    return texts


def load_model(folder: Path) -> Any:
    """The frozen base model, from its folder."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return model.requires_grad_(False)


def loss_of(model: nn.Module, texts: Sequence[Text]) -> Tensor:
    """Transformers' own loss on a padded batch, which takes all logits."""
    width = max(len(ids) for ids, _ in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (text, answer) in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
        labels[row, answer : len(text)] = ids[row, answer : len(text)]
    out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    return out.loss  # type: ignore[no-any-return]


def train(model: nn.Module, texts: Sequence[Text], seed: int) -> None:
    """One epoch of AdamW in random order; the rate falls to 0."""
    torch.manual_seed(seed)
    model.train()
    leaves = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=LR, weight_decay=WEIGHT_DECAY)
    order = torch.randperm(len(texts)).tolist()
    steps = range(0, len(order), BATCH)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    for first in steps:
        optimizer.zero_grad()
        loss_of(model, [texts[at] for at in order[first : first + BATCH]]).backward()
        nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer.step()
        falling.step()


@torch.no_grad()
def test_loss(model: nn.Module, texts: Sequence[Text]) -> float:
    """The mean loss of all answer tokens."""
    model.eval()
    total = 0.0
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        total += float(loss_of(model, batch)) * sum(len(ids) - answer for ids, answer in batch)
    return total / sum(len(ids) - answer for ids, answer in texts)


@torch.no_grad()
def write_answers(model: Any, folder: Path, texts: Sequence[Text], tokens: int, batch: int) -> None:
    """Write an answer to every text, so many at a time."""
    tokenizer = tokenizer_of(folder)
    model.eval()
    for first in range(0, len(texts) if tokens else 0, batch):
        prompts = [ids[:answer] for ids, answer in texts[first : first + batch]]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(each)) + each for each in prompts])
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            num_beams=BEAMS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


class Written(nn.Module):
    """FedALT's layer as it is usually written: one slot after the other, a softmax over both."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        d_in, d_out, bound = base.in_features, base.out_features, base.in_features**-0.5
        self.a = nn.Parameter(torch.empty(RANK, d_in).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(d_out, RANK))
        self.row_a = nn.Parameter(torch.zeros(RANK, d_in), requires_grad=False)
        self.row_b = nn.Parameter(torch.zeros(d_out, RANK), requires_grad=False)
        self.g = nn.Parameter(torch.empty(2, d_in).uniform_(-bound, bound))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, d_in) -> (batch, tokens, d_out)."""
        out: Tensor = self.base(x)
        weights = torch.softmax(x @ self.g.T, dim=-1)
        dropped = self.dropout(x)
        for slot, (a, b) in enumerate(((self.a, self.b), (self.row_a, self.row_b))):
            out = out + weights[..., slot : slot + 1] * ((dropped @ a.T) @ b.T) * (ALPHA / RANK)
        return out


def load_client(folder: Path, states: Path, client: str) -> nn.Module:
    """The base model, loaded anew, with a client's adapters and mixer, if there are some yet."""
    model: nn.Module = load_model(folder)
    torch.manual_seed(0)  # the same start for every client
    for parent in list(model.modules()):
        for site, base in list(parent.named_children()):
            if site in SITES and isinstance(base, nn.Linear):
                setattr(parent, site, Written(base))
    for state in (states / f"{client}.own.safetensors", states / f"{client}.row.safetensors"):
        if state.exists():
            model.load_state_dict(load_file(state), strict=False)
    return model


def run_reference(folder: Path, out: Path, rounds: int, answers: int) -> list[float]:
    """FedALT client by client, each with a model of its own; the clients' test losses."""
    clients = clients_of(folder)
    for round_ in range(rounds):
        for at, client in enumerate(clients):
            model = load_client(folder, out, client)
            train(model, texts_of(folder, client, "train"), seed=round_ * len(clients) + at)
            own = {n: leaf.data for n, leaf in model.named_parameters() if leaf.requires_grad}
            save_file(own, out / f"{client}.own.safetensors")
            del model  # before the next one is loaded
        states = {each: load_file(out / f"{each}.own.safetensors") for each in clients}
        for client in clients:
            others = [states[each] for each in clients if each != client]
            row = {
                name[:-1] + f"row_{name[-1]}": torch.stack([each[name] for each in others]).mean(0)
                for name in others[0]
                if not name.endswith(".g")
            }
            save_file(row, out / f"{client}.row.safetensors")
    losses = []
    for client in clients:
        model, texts = load_client(folder, out, client), texts_of(folder, client, "test")
        losses.append(test_loss(model, texts))
        write_answers(model, folder, texts, answers, 2)
    return losses


def run_fedalt(folder: Path, out: Path, rounds: int, answers: int) -> list[float]:
    """FedALT with this package; the clients' test losses."""
    from fedalt.runs.lifecycle import start_run
    from fedalt.runs.settings import settings_of
    from fedalt.runs.setup import prepare

    table = {
        "local_baseline": False,
        "data": {"path": str(folder / "data"), "validation": 0.0},
        "model": {"name": str(folder / "model"), "targets": SITES, "device": "cpu"},
        "method": {"name": "fedalt", "rank": RANK, "alpha": ALPHA, "dropout": DROPOUT},
        "training": {"lr": LR, "weight_decay": WEIGHT_DECAY, "clip": CLIP, "batch_size": BATCH},
        "rounds": {"rounds": rounds, "select": "last"},
        "scoring": {"generate": bool(answers), "beams": BEAMS, "max_new_tokens": answers or 1},
    }
    run = start_run(prepare(settings_of(table, "benchmark")), out / "run")
    scores = [line for line in run.lines() if line["kind"] == "score" and line["column"] == "own"]
    return [line["metrics"]["loss"] for line in scores]


def measure(
    variant: str, python: str, folder: Path, out: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Run a variant in a process of its own: seconds, MiB, mean test loss."""
    out.mkdir()
    given = [str(folder), str(out), str(options.rounds), str(options.answers)]
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, __file__, "--one", variant, *given]
    if variant == "trainer":
        command = [python, str(HERE / "trainer_fedit.py"), *given]
    elif variant == "flower":
        command = [python, str(HERE / "flower_fedit.py"), *given]
        settings |= {"PYTHONPATH": str(HERE), "FLWR_HOME": str(out), "FLWR_TELEMETRY_ENABLED": "0"}
        settings |= {"FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    log = out / "log.txt"
    with log.open("w") as said:
        began = time.perf_counter()
        env = {**os.environ, **settings}
        process = subprocess.Popen(command, stdout=said, stderr=said, env=env)
        watch = Watch(process.pid)
        watch.start()
        code = process.wait()
        seconds = time.perf_counter() - began
    watch.ended.set()
    watch.join()
    if code or not (out / "losses.json").exists():
        raise SystemExit(f"{variant} ended with {code}:\n{log.read_text()[-3000:]}")
    losses = json.loads((out / "losses.json").read_text())
    loss = round(statistics.fmean(losses), 3)
    return {"seconds": round(seconds, 1), "mib": round(watch.peak / 1024), "loss": loss}


def main() -> None:
    """Measure, print a line for every variant and one with the ratios."""
    if sys.argv[1:2] == ["--one"]:
        run = {"fedalt": run_fedalt, "reference": run_reference}[sys.argv[2]]
        folder, out = map(Path, sys.argv[3:5])
        rounds, answers = map(int, sys.argv[5:7])
        (out / "losses.json").write_text(json.dumps(run(folder, out, rounds, answers)))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", nargs="+", default=["40M"], choices=SIZES)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answers", type=int, default=0, help="their most tokens")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--flower-python", help="an interpreter with flwr[simulation]")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    options = parser.parse_args()
    if options.clients < 2:
        parser.error("a federation has two clients at least")
    pythons = dict.fromkeys((v for v in VARIANTS if v in options.variants), sys.executable)
    if "flower" in pythons and options.flower_python is None:
        del pythons["flower"]
        print(json.dumps({"variant": "flower", "left_out": "no --flower-python"}))
    elif "flower" in pythons:
        pythons["flower"] = options.flower_python
    rows = [row for size in options.size for row in compare(size, pythons, options)]
    if options.write:
        real = options.size == ["smollm2"]
        write("experiment-of-a-real-base" if real else "experiment", table(rows))


def bound_of(folder: Path, size: str) -> float:
    """The seconds that no round's training can do without on this machine."""
    import step
    from step_variants import model_of

    from fedalt.data.examples import Example

    clients = [
        [Example(tuple(ids), at, "") for ids, at in texts_of(folder, client, "train")]
        for client in clients_of(folder)
    ]
    rates = [step.matmul_rate() for _ in range(5)]
    return step.bound_of(model_of(size), clients) / statistics.median(rates)


def compare(
    size: str, pythons: Mapping[str, str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure every variant in turns; a row for each."""
    found: dict[str, list[dict[str, float]]] = {each: [] for each in pythons}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = write_model(folder / "model", size)
        write_clients(folder / "data", options.clients, words)
        for turn in range(options.turns):
            for variant, python in pythons.items():
                out = folder / f"{variant}-{turn}"
                found[variant].append(measure(variant, python, folder, out, options))
        bound = round(options.rounds * bound_of(folder, size), 1)
    setup = {
        "size": size,
        "clients": options.clients,
        "rounds": options.rounds,
        "answers": options.answers,
        "bound": bound,
    }
    rows: list[dict[str, Any]] = []
    for variant, turns in found.items():
        median = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        row = {"variant": variant, **setup, "turns": len(turns), **median}
        if rows and "fedalt" in found:
            row["time / fedalt"] = round(median["seconds"] / rows[0]["seconds"], 2)
            row["memory / fedalt"] = round(median["mib"] / rows[0]["mib"], 2)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
