"""FedIT under Flower's simulation: the third variant of experiment.py, which starts it.

    python benchmarks/flower_fedit.py FOLDER OUT ROUNDS ANSWERS

needs flwr[simulation], peft and transformers, and not this package. FOLDER is what experiment.py
writes; the clients' test losses go to OUT/losses.json. As in Flower's own examples, a client loads
the base model whenever it is called.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from experiment import (
    ALPHA,
    BATCH,
    DROPOUT,
    RANK,
    SITES,
    clients_of,
    load_model,
    test_loss,
    texts_of,
    train,
    write_answers,
)
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)


def load_adapted(folder: Path) -> Any:
    """The base model with a new LoRA, the same every time."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), lora_dropout=DROPOUT, target_modules=SITES)
    return get_peft_model(load_model(folder), config)


def received(message: Message, context: Context) -> tuple[Path, str, Any]:
    """The folder, the client's name, and the model that the server sent."""
    folder = Path(message.content["config"]["folder"])
    client = clients_of(folder)[context.node_config["partition-id"]]
    model = load_adapted(folder)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    return folder, client, model


def train_client(message: Message, context: Context) -> Message:
    """One epoch; the adapter goes back."""
    folder, client, model = received(message, context)
    texts = texts_of(folder, client, "train")
    clients, round_ = (
        context.node_config["num-partitions"],
        message.content["config"]["server-round"],
    )
    train(model, texts, seed=(round_ - 1) * clients + context.node_config["partition-id"])
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    metrics = MetricRecord({"num-examples": len(texts)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def test_client(message: Message, context: Context) -> Message:
    """The loss on the client's test texts, and answers."""
    folder, client, model = received(message, context)
    texts = texts_of(folder, client, "test")
    write_answers(model, folder, texts, message.content["config"]["answers"], BATCH)
    metrics = MetricRecord({"loss": test_loss(model, texts), "num-examples": len(texts)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def main() -> None:
    """Train, test after the last round, write the losses."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    rounds, answers = int(sys.argv[3]), int(sys.argv[4])
    clients = len(clients_of(folder))
    client_app, server_app = ClientApp(), ServerApp()
    client_app.train()(train_client)
    client_app.evaluate()(test_client)

    def serve(grid: Grid, _: Context) -> None:
        first = ArrayRecord(get_peft_model_state_dict(load_adapted(folder)))
        config = ConfigRecord({"folder": str(folder), "answers": answers})
        training = FedAvg(fraction_evaluate=0.0)
        last = training.start(grid, first, num_rounds=rounds, train_config=config).arrays
        testing = FedAvg().configure_evaluate(rounds, last, config, grid)
        replies = list(grid.send_and_receive(testing))
        losses = [float(reply.content["metrics"]["loss"]) for reply in replies]
        assert len(losses) == clients
        (out / "losses.json").write_text(json.dumps(losses))

    server_app.main()(serve)
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False},
        },
    )


if __name__ == "__main__":
    main()
