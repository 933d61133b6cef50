"""Client files written by tests, and a tokenizer whose tokens can be counted by hand."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNK = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def bytewise(*, bos: bool = False, chat: bool = False, **names: Any) -> PreTrainedTokenizerFast:
    """One token per byte; `bos`: the tokenizer itself puts <s> in front of a text."""
    vocabulary = {"<s>": BOS, "</s>": EOS, "<unk>": UNK}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
        )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | names
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def asked(instruction: str, output: str, **more: object) -> dict[str, object]:
    """A record in the instruction form."""
    return {"instruction": instruction, "output": output, **more}


def write_lines(file: Path, rows: Iterable[object]) -> Path:
    """A file of JSON lines; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def write_clients(folder: Path, **files: Iterable[object]) -> Path:
    """A folder of client files; `a_train=[...]` becomes a.train.jsonl."""
    for name, rows in files.items():
        client, _, split = name.rpartition("_")
        write_lines(folder / f"{client}.{split}.jsonl", rows)
    return folder
