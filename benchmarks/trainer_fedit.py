"""FedIT as a loop around transformers' Trainer: a variant of experiment.py, which starts it.

    python benchmarks/trainer_fedit.py FOLDER OUT ROUNDS ANSWERS

needs peft and transformers, and not this package. It is what a user writes who knows no framework
for federations: the base model is loaded once, and each client and round has one Trainer, written
as its documentation shows; what is not named here is the Trainer's own default.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from experiment import (
    ALPHA,
    BATCH,
    CLIP,
    DROPOUT,
    LR,
    RANK,
    SITES,
    WEIGHT_DECAY,
    Text,
    clients_of,
    load_model,
    test_loss,
    texts_of,
    tokenizer_of,
    write_answers,
)
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments


def rows_of(texts: Sequence[Text]) -> list[dict[str, list[int]]]:
    """Texts as rows of a dataset, with labels where the answer is."""
    return [
        {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [-100] * answer + ids[answer:],
        }
        for ids, answer in texts
    ]


def train_client(model: Any, folder: Path, out: Path, client: str, seed: int) -> None:
    """One epoch on a client's texts."""
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows_of(texts_of(folder, client, "train")),
        data_collator=DataCollatorForSeq2Seq(tokenizer_of(folder)),
    ).train()


def main() -> None:
    """Train, average round by round, test after the last one, write the losses."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    rounds, answers = int(sys.argv[3]), int(sys.argv[4])
    clients = clients_of(folder)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), lora_dropout=DROPOUT, target_modules=SITES)
    model = get_peft_model(load_model(folder), config)
    shared = {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
    for round_ in range(rounds):
        total = {name: torch.zeros_like(t) for name, t in shared.items()}
        for at, client in enumerate(clients):
            set_peft_model_state_dict(model, shared)
            train_client(model, folder, out, client, seed=round_ * len(clients) + at)
            for name, tensor in get_peft_model_state_dict(model).items():
                total[name] += tensor.detach()
        shared = {name: tensor / len(clients) for name, tensor in total.items()}
    set_peft_model_state_dict(model, shared)
    losses = []
    for client in clients:
        texts = texts_of(folder, client, "test")
        losses.append(test_loss(model, texts))
        write_answers(model, folder, texts, answers, BATCH)
    (out / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
