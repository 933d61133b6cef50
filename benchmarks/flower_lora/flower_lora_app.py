"""FedAvg over PEFT's LoRA as an app for Flower, the way its examples write one.

The base model is loaded with every message, because Flower starts a process for each. Seconds of
every round go to FOLDER/rounds.json: in all, and those of the slowest client's training.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

server = ServerApp()  # Flower looks for these two names without running the file
client = ClientApp()


def load_adapted(context: Context) -> Any:
    """The base model with a new LoRA, the same every time."""
    sys.path.insert(0, str(context.run_config["benchmarks"]))
    from experiment import ALPHA, DROPOUT, SITES, load_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=int(context.run_config["rank"]),
        lora_alpha=int(ALPHA),
        lora_dropout=DROPOUT,
        target_modules=SITES,
    )
    return get_peft_model(load_model(Path(str(context.run_config["folder"]))), config)


@client.train()
def train_client(message: Message, context: Context) -> Message:
    """One epoch; the adapter goes back."""
    model = load_adapted(context)
    from experiment import clients_of, texts_of, train

    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    folder, at = Path(str(context.run_config["folder"])), int(context.node_config["partition-id"])
    texts = texts_of(folder, clients_of(folder)[at], "train")
    began = time.monotonic()
    train(model, texts, seed=at)
    metrics = MetricRecord({"num-examples": len(texts), "seconds": time.monotonic() - began})
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """FedAvg; what each round took."""
    clients = int(context.run_config["clients"])
    rounds: list[dict[str, float]] = []
    last = 0.0

    class Timed(FedAvg):
        """FedAvg that looks at the clock."""

        def configure_train(self, *args: Any, **kwargs: Any) -> Any:
            """Begin a round."""
            nonlocal last
            last = time.monotonic()
            return super().configure_train(*args, **kwargs)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            """End it."""
            replies = list(replies)
            trained = max(float(each.content["metrics"]["seconds"]) for each in replies)
            found = super().aggregate_train(server_round, replies)
            rounds.append({"seconds": time.monotonic() - last, "training": trained})
            return found

    first = ArrayRecord(get_peft_model_state_dict(load_adapted(context)))
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    count = int(context.run_config["rounds"])
    strategy.start(grid, first, num_rounds=count, train_config=ConfigRecord({}))
    out = Path(str(context.run_config["folder"])) / "rounds.json"
    out.write_text(json.dumps(rounds))
