"""The README of an exported folder: what it is, how it loads, and how it wants to be asked."""

import json
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from fedalt.core.foreign import shown
from fedalt.data.chat_template import days_in, special_ids
from fedalt.data.prompts import encode_prompt, opened, opening_ids
from fedalt.evaluation.asking import ends, room_of
from fedalt.export.folders import own_slot
from fedalt.export.llama_cpp import FILE
from fedalt.models.base import BUILT_IN, gguf_file, location
from fedalt.models.config import network_config, own_labels
from fedalt.models.gguf import SUFFIX
from fedalt.runs.answers import Served
from fedalt.runs.settings import method_name
from fedalt.runs.setup import question

What = Literal["fedalt", "individual", "peft", "merged", "gguf"]
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def card(of: Served, client_id: str, what: What, note: str = "") -> str:
    """Markdown whose Python code runs in the folder and asks as the client was trained.

    `note` is what a reader should know of this way to write the model.

    A model that has learnt to answer within a template answers worse outside it.
    """
    name, base = shown(of.parts.base.name), location(of.parts.base.name)
    on_hub = name != BUILT_IN and not Path(base).exists()
    about = f"library_name: peft\n{f'base_model: {json.dumps(name)}' if on_hub else ''}".strip()
    own = own_slot(of.serving.plan).name if what == "individual" else ""
    kinds = {
        "fedalt": "the whole personalised model, all adapters and what weighs them",
        "individual": f"the client's adapter {own!r} alone, as a LoRA that PEFT loads "
        "without fedalt",
        "peft": "all of the client's adapters as one LoRA, which PEFT loads without fedalt",
        "merged": "the base model with the client's adapters merged into its weights",
        "gguf": "all of the client's adapters as one LoRA for llama.cpp",
    }
    return f"""---
{about}
tags:
- fedalt
- lora
- federated-learning
---

# The model of client {client_id}

Trained with {method_name(of.parts.settings.method)} on {name} by fedalt {version("fedalt")}: \
{kinds[what]}.
{f"{chr(10)}{note[:1].upper()}{note[1:]}.{chr(10)}" if note else ""}
{_use(of, client_id, base, what)}"""


def asked_as(of: Served) -> dict[str, object]:
    """The same for a server: the form of a prompt, its template, and the longest answer."""
    return {
        "form": of.form,
        "template": of.template.text,
        "max_new_tokens": of.parts.settings.scoring.max_new_tokens,
    }


def _use(of: Served, client_id: str, base: str, what: What) -> str:
    if what == "gguf":
        return _llama_cpp(of, base)
    return f"""```python
{_loading(of, base, what)}
{_asking(of)}
```
{_vllm(of, client_id, base, what)}"""


def _llama_cpp(of: Served, base: str) -> str:
    """How llama.cpp serves the adapter."""
    file, made = gguf_file(of.parts.base.name), ""
    whole = f"BASE{SUFFIX}" if file is None else str(file.absolute())
    if file is None:
        made = f"`{whole}` is {shown(base)} as llama.cpp's `convert_hf_to_gguf.py` writes it. "
    return f"""```
llama-server --model {shlex.quote(whole)} --lora {FILE}
```

{made}The command was not tried here. The client was trained on prompts of this form, in Python:

```python
{_prompt(of)}
```
"""


def _loading(of: Served, base: str, what: What) -> str:
    classifies = bool(of.parts.base.adapted.heads)
    asks = "" if classifies else "import torch\n"
    names = ["AutoTokenizer"] if classifies else ["AutoTokenizer", "GenerationConfig"]
    if what == "fedalt":
        return f"""import fedalt
{asks}from transformers import {", ".join(names)}

model = fedalt.load(".")
tokenizer = AutoTokenizer.from_pretrained(".")
"""
    if what == "merged":
        return f"""{asks}from transformers import {", ".join(["AutoModelForCausalLM", *names])}

model = AutoModelForCausalLM.from_pretrained(".").eval()
tokenizer = AutoTokenizer.from_pretrained(".")
"""
    kind, more, lasting = "CausalLM", "", ""
    if classifies:
        model = of.parts.base.adapted.model
        kind, more = "SequenceClassification", f", num_labels={model.config.num_labels}"
        labels = tuple(model.config.id2label.values())
        own = own_labels(network_config(of.parts.base.name, base, labels))
        if len(own) not in (0, len(labels)):
            more += ", ignore_mismatched_sizes=True"  # the head, in whose place PEFT puts its own
        if hasattr(model, "score"):
            lasting = "base.config.pad_token_id = None  # of one text the last token counts\n"
    if of.parts.base.adapted.model.dtype == torch.float32:
        # Transformers takes the checkpoint's own dtype, and answers in it are not the run's.
        more += ', dtype="float32"'
    imported = ", ".join([f"AutoModelFor{kind}", *names])
    made = ""
    if gguf_file(name := of.parts.base.name) is not None:
        made = f"""# The base model is {shown(name)} as fedalt has converted it into its cache.
# Where the folder is gone, `fedalt export` of the same model makes it anew.
"""
    if bits := of.parts.base.quantise:
        made += f"# The adapter was trained on this base in {bits}; answers differ a little here.\n"
    return f"""{asks}from peft import PeftModel
from transformers import {imported}

{made}base = AutoModelFor{kind}.from_pretrained({base!r}{more})
{lasting}model = PeftModel.from_pretrained(base, ".").eval()
tokenizer = AutoTokenizer.from_pretrained({base!r})
"""


def _vllm(of: Served, client_id: str, base: str, what: What) -> str:
    """How vLLM serves a plain adapter; it knows some ranks only."""
    if what != "peft" or of.parts.base.adapted.heads:
        return ""
    rank = sum(slot.rank for slot in of.serving.plan.slots)
    most = next((known for known in _VLLM_RANKS if known >= rank), rank)
    words = [
        "vllm serve",
        shlex.quote(base),
        f"--enable-lora --max-lora-rank {most} --lora-modules",
    ]
    return f"""
vLLM serves it, if it serves the base model (not tried here):

```
{" ".join([*words, shlex.quote(f"{client_id}=.")])}
```
"""


def _asking(of: Served) -> str:
    """Code that asks as `fedalt generate` does: the same ids, the same search, the same ends."""
    if of.form not in ("instruction", "prompt", "messages"):
        return _classifying(of)
    base, scoring = of.parts.base, of.parts.settings.scoring
    tokenizer = base.tokenizer
    opening = list(opening_ids(tokenizer)) if of.form != "messages" else []
    lines = [*_fixed_day(of), 'question = "..."', f"prompt = {_prompt(of)}"]
    lines.append("ids = tokenizer(prompt, add_special_tokens=False).input_ids")
    if opening:
        lines.append(f"ids = ids if ids[: {len(opening)}] == {opening} else {opening} + ids")
    most = min(of.parts.settings.data.max_length, room_of(base, scoring))
    asked = encode_prompt(question(of.form, "a"), tokenizer, of.template, max_length=most)
    begin, _ = opened(asked, tokenizer)
    head = len(begin) + (most - len(begin)) // 4
    lines.append(f"if len(ids) > {most}:  # a prompt that is too long loses its middle")
    lines.append(f"    ids = ids[:{head}] + ids[len(ids) - {most - head} :]")
    new_tokens = str(scoring.max_new_tokens)
    if scoring.max_new_tokens > base.positions // 2:
        new_tokens = f"min({new_tokens}, {base.positions} - len(ids))"
    lines.append(
        f"""tokens = torch.tensor([ids], device=model.device)
# Nothing of the base model's own settings, such as a repetition penalty, takes part.
model.generation_config = GenerationConfig(
    max_new_tokens={new_tokens},
    num_beams={scoring.beams},
    do_sample=False,
    eos_token_id={list(ends(base))},
    pad_token_id={base.pad_id},
)
written = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens))
answer = written[0, len(ids) :].tolist()"""
    )
    added, special = set(tokenizer.get_added_vocab().values()), special_ids(tokenizer)
    if unseen := [end for end in ends(base) if end in added - special]:
        lines.append(
            f"answer = answer[: next((at for at, each in enumerate(answer) if each in {unseen}), "
            "None)]"
        )
    lines.append("print(tokenizer.decode(answer, skip_special_tokens=True).strip())")
    return "\n".join(lines)


def _prompt(of: Served) -> str:
    """An expression for the prompt, of `question`."""
    match of.form:
        case "instruction":
            more = ', input=""' if "{input}" in of.template.text.replace("{{", "") else ""
            return f"{of.template.text!r}.format(instruction=question{more})"
        case "prompt":
            return "question"
        case _:
            return (
                'tokenizer.apply_chat_template(\n    [{"role": "user", "content": question}],'
                "\n    add_generation_prompt=True,\n    tokenize=False,\n)"
            )


def _fixed_day(of: Served) -> list[str]:
    """Lines that keep a chat template from telling another day than in training."""
    if of.form != "messages":
        return []
    days = days_in(of.parts.base.tokenizer.get_chat_template())
    lines = [
        f"tokenizer.chat_template = tokenizer.chat_template.replace(\n    {call!r}, {day!r}\n)"
        for call, day in days.items()
    ]
    if not lines:
        return []
    return ["# The chat template tells what day it is; in training it was always this one.", *lines]


def _classifying(of: Served) -> str:
    labels = of.parts.base.adapted.model.config.id2label
    most = min(of.parts.settings.data.max_length, of.parts.base.positions)
    return f"""text, second = "...", None  # of a pair the second text
tokens = tokenizer(text, second, truncation=True, max_length={most}, return_tensors="pt")
labels = {[labels[at] for at in sorted(labels)]!r}
print(labels[int(model(**tokens.to(model.device)).logits.argmax())])"""
