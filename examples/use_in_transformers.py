"""Generate an answer with a client's exported model and transformers.

python examples/use_in_transformers.py FOLDER --prompt "Name a colour."
"""

import argparse

from transformers import AutoTokenizer

import fedalt


def main() -> None:
    """Load, generate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder written by `fedalt export`")
    parser.add_argument("--prompt", default="Once upon a time", help="prompt to answer")
    parser.add_argument("--tokens", type=int, default=40, help="maximum length of the answer")
    options = parser.parse_args()

    model = fedalt.load(options.folder)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    prompt = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    written = model.generate(**prompt, max_new_tokens=options.tokens, do_sample=False)
    answer = written[0, prompt["input_ids"].shape[1] :]
    print(tokenizer.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    main()
