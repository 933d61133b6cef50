"""Answers for many clients at once against one client at a time, and against PEFT's mixed batches.

    python benchmarks/serving.py --write        # 8 and 64 clients, 16 requests at once

The built-in base model, questions of the built-in suite for its clients in turn, and for each
client FedALT's plan with rank 8: two adapters and a mixer. `served` is the engine of
`fedalt serve`, `alone` asks one question after the other as `fedalt generate` does; how many of
their answers are the same is counted. `PEFT` is `adapter_names` of PEFT's generate with one plain
adapter of rank 8 for each client, in batches of as many questions as are served at once, all of
whose answers are as long as they may be, so that no row is idle; `served whole` is the engine with
answers of that length. All linear layers are adapted. Variants take turns;
figures are medians of written tokens for each second of one processor. `adapters` is what the
clients' adapters take in memory beside the base model.

    python benchmarks/serving.py --load 600 --url http://127.0.0.1:8000   # against a running server

asks for that many seconds, hangs up on every third answer, and prints every minute what the server
says of itself; the others' answers have to be complete.
"""

import argparse
import asyncio
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from document import table, write
from peft import LoraConfig, get_peft_model
from scoring import clients_of
from transformers import AutoModelForCausalLM

from fedalt.evaluation import Scoring, generate
from fedalt.methods.contract import Serving
from fedalt.models.base import Base, load_base, location
from fedalt.serving.answer import Text
from fedalt.serving.batch import Adapters
from fedalt.serving.engine import Engine, Request

DOCUMENT = Path(__file__).parent.parent / "docs" / "serving.md"
Asked = Sequence[tuple[int, tuple[int, ...]]]  # a client, and a prompt


def served(
    base: Base,
    clients: Sequence[Adapters],
    asked: Asked,
    tokens: int,
    rows: int,
    *,
    ends: bool = True,
) -> list[list[int]]:
    """What the engine writes; without `ends` every answer has all tokens."""
    engine = Engine(base, rows=rows, queue=len(asked))
    if not ends:
        engine._ends = frozenset()
    left = threading.Semaphore(0)
    requests = [
        Request(clients[who], prompt, tokens, lambda _, end: left.release() if end else None)
        for who, prompt in asked
    ]
    engine.start()
    for request in requests:
        engine.submit(request)
    for _ in requests:
        left.acquire()
    engine.close()
    return [request.written for request in requests]


def mixed(servings: Sequence[Serving], pad: int) -> Callable[[Asked, int, int], int]:
    """PEFT's model with the first adapter of every client; it answers, and counts tokens."""
    network = AutoModelForCausalLM.from_pretrained(location("tiny"), dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    model: Any = get_peft_model(network, config, "0")
    for number in range(1, len(servings)):
        model.add_adapter(str(number), config)
    tensors = model.state_dict()
    for at, serving in enumerate(servings):
        for name, tensor in serving.tree.items():
            if name.slot == serving.plan.slots[0].name:
                tensors[f"base_model.model.{name.site}.lora_{name.factor}.{at}.weight"].copy_(
                    tensor
                )
    model.eval()

    @torch.no_grad()
    def answer(asked: Asked, tokens: int, rows: int) -> int:
        count = 0
        for first in range(0, len(asked), rows):
            batch = asked[first : first + rows]
            width = max(len(prompt) for _, prompt in batch)
            ids = torch.tensor([[pad] * (width - len(ids)) + [*ids] for _, ids in batch])
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in batch])
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                adapter_names=[str(who) for who, _ in batch],
                max_new_tokens=tokens,
                min_new_tokens=tokens,  # none of its rows is idle
                do_sample=False,
                use_cache=True,
                pad_token_id=pad,
            )
            count += out[:, width:].numel()
        return count

    return answer


def measure(count: int, requests: int, tokens: int, rows: int, turns: int) -> dict[str, Any]:
    """One row of the table."""
    base = load_base("tiny", targets="all-linear", device="cpu")
    own = clients_of(base, count, max(1, -(-requests // count)))
    servings = [serving for serving, _ in own]
    adapters = [Adapters.of(base, at, serving) for at, serving in enumerate(servings)]
    asked = [(at % count, own[at % count][1][at // count].prompt_ids) for at in range(requests)]
    random.Random(0).shuffle(asked)
    with_peft = mixed(servings, base.pad_id)
    scoring = Scoring(max_new_tokens=tokens)
    seconds: dict[str, list[float]] = {"served": [], "alone": [], "whole": [], "PEFT": []}
    written = served(base, adapters, asked[:rows], 4, rows)  # to warm up
    with_peft(asked[:rows], 4, rows)
    for _ in range(turns):
        began = time.process_time()
        written = served(base, adapters, asked, tokens, rows)
        seconds["served"].append(time.process_time() - began)
        began = time.process_time()
        alone = [generate(base, servings[who], [prompt], scoring)[0] for who, prompt in asked]
        seconds["alone"].append(time.process_time() - began)
        began = time.process_time()
        whole = served(base, adapters, asked, tokens, rows, ends=False)
        seconds["whole"].append(time.process_time() - began)
        began = time.process_time()
        of_peft = with_peft(asked, tokens, rows)
        seconds["PEFT"].append(time.process_time() - began)
    same = [text_of(base, ids) == text for ids, text in zip(written, alone, strict=True)]
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    ours = sum(map(len, written))
    assert sum(map(len, whole)) == of_peft
    return {
        "clients": count,
        "served, tokens/s": f"{ours / median['served']:.0f}",
        "alone": f"{ours / median['alone']:.0f}",
        "served / alone": f"{median['alone'] / median['served']:.1f}",
        "served whole": f"{of_peft / median['whole']:.0f}",
        "PEFT": f"{of_peft / median['PEFT']:.0f}",
        "served whole / PEFT": f"{median['PEFT'] / median['whole']:.2f}",
        "same answers": f"{sum(same)} of {len(same)}",
        "adapters, MB": f"{sum(t.nbytes for s in servings for t in s.tree.values()) / 1e6:.0f}",
    }


def text_of(base: Base, ids: Sequence[int]) -> str:
    """An answer as the server tells it."""
    text = Text(base)
    return "".join(text.add(token, last=at == len(ids) - 1) for at, token in enumerate(ids))


async def load(url: str, seconds: float, concurrent: int) -> None:
    """Ask a server, and hang up on every third answer. Raises where another one is not complete."""
    ends = time.monotonic() + seconds
    counts = {"complete": 0, "hung up": 0}

    async def visitor(client: httpx.AsyncClient, names: Sequence[str], number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < ends:
            messages = [{"role": "user", "content": f"{chance.random()} apples or pears?"}]
            body = {"model": chance.choice(names), "messages": messages, "stream": True}
            leaves = chance.randrange(3) == 0
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                lines = answer.aiter_lines()
                last = ""
                async for line in lines:
                    last = line or last
                    if leaves and chance.randrange(4) == 0:
                        break
            counts["hung up" if leaves else "complete"] += 1
            if not leaves and last != "data: [DONE]":
                raise SystemExit(f"an answer ended with {last[:80]!r}")

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        names = [model["id"] for model in listed]
        visitors = [visitor(client, names, number) for number in range(concurrent)]
        done = asyncio.gather(*visitors)
        while not done.done():
            await asyncio.wait({done}, timeout=min(60.0, max(seconds / 4, 1)))
            print(json.dumps({**counts, **_resident(url)}), flush=True)
        await done
        metrics = (await client.get("/metrics")).text
        print("\n".join(line for line in metrics.splitlines() if not line.startswith("#")))


def _resident(url: str) -> dict[str, str]:
    """The memory of the process that listens at a port of this machine."""
    port = httpx.URL(url).port
    for connection in psutil.net_connections("tcp"):
        if connection.status == "LISTEN" and connection.laddr.port == port and connection.pid:
            size = psutil.Process(connection.pid).memory_info().rss
            return {"server, MB": f"{size / 1e6:.0f}"}
    return {}


def main() -> None:
    """Measure and print a line for every number of clients, or load a server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--load", type=float, help="seconds to ask a running server")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    options = parser.parse_args()
    if options.load:
        asyncio.run(load(options.url, options.load, options.rows))
        return
    torch.set_num_threads(1)
    rows = []
    for count in options.clients:
        rows.append(measure(count, options.requests, options.tokens, options.rows, options.turns))
        print(json.dumps(rows[-1]), flush=True)
    if options.write:
        write("serving", table(rows), DOCUMENT)


if __name__ == "__main__":
    main()
