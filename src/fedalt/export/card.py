"""The README of an exported folder: what it is, how it loads, and how it wants to be asked."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from fedalt.answers import Served
from fedalt.data.foreign import shown
from fedalt.models import BUILT_IN, location
from fedalt.settings import method_name

What = Literal["personal", "individual"]


def card(of: Served, client_id: str, what: What) -> str:
    """Markdown whose Python code runs in the folder and asks as the client was trained.

    A model that has learnt to answer within a template answers worse outside it.
    """
    name, base = shown(of.parts.base.name), location(of.parts.base.name)
    on_hub = name != BUILT_IN and not Path(base).exists()
    about = f"library_name: peft\n{f'base_model: {json.dumps(name)}' if on_hub else ''}".strip()
    whole = "the whole personalised model, all adapters and what weighs them"
    lone = "the client's individual adapter alone, as a LoRA that PEFT loads without fedalt"
    return f"""---
{about}
tags:
- fedalt
- lora
- federated-learning
---

# The model of client {client_id}

Trained with {method_name(of.parts.settings.method)} on {name} by fedalt {version("fedalt")}: \
{whole if what == "personal" else lone}.

```python
{_loading(of, base, what)}
{_asking(of)}
```
"""


def _loading(of: Served, base: str, what: What) -> str:
    labels = of.parts.base.adapted.model.config.num_labels if of.parts.base.adapted.heads else None
    if what == "personal":
        return """import fedalt
from transformers import AutoTokenizer

model = fedalt.load(".")
tokenizer = AutoTokenizer.from_pretrained(".")
"""
    kind = "CausalLM" if labels is None else "SequenceClassification"
    more = "" if labels is None else f", num_labels={labels}"
    return f"""from peft import PeftModel
from transformers import AutoModelFor{kind}, AutoTokenizer

base = AutoModelFor{kind}.from_pretrained({base!r}{more})
model = PeftModel.from_pretrained(base, ".").eval()
tokenizer = AutoTokenizer.from_pretrained({base!r})
"""


def _asking(of: Served) -> str:
    scoring = of.parts.settings.scoring
    special = ""
    match of.form:
        case "instruction":
            more = ', input=""' if "{input}" in of.template.text.replace("{{", "") else ""
            prompt = f"{of.template.text!r}.format(instruction=question{more})"
        case "prompt":
            prompt = "question"
        case "messages":
            turns = '[{"role": "user", "content": question}]'
            prompt = (
                f"tokenizer.apply_chat_template(\n    {turns}, add_generation_prompt=True, "
                "tokenize=False\n)"
            )
            special = ", add_special_tokens=False"
        case _:
            labels = of.parts.base.adapted.model.config.id2label
            return f"""text = "..."
tokens = tokenizer(text, return_tensors="pt").to(model.device)
labels = {[labels[at] for at in sorted(labels)]!r}
print(labels[int(model(**tokens).logits.argmax())])"""
    return f"""question = "..."
prompt = {prompt}
tokens = tokenizer(prompt, return_tensors="pt"{special}).to(model.device)
written = model.generate(
    **tokens, max_new_tokens={scoring.max_new_tokens}, num_beams={scoring.beams}, do_sample=False
)
print(tokenizer.decode(written[0, tokens.input_ids.shape[1] :], skip_special_tokens=True))"""
