"""What a loaded model is tried for before anything is trained on it."""

from collections.abc import Iterable

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedalt.adapters.packing import agree
from fedalt.adapters.reach import read, short_texts
from fedalt.models.errors import ModelError, in_short


def require_causal(model: PreTrainedModel, name: str) -> None:
    """Raise ModelError for a model whose logits of a token depend on the tokens that follow it.

    Also for one without an output embedding that turns each token's hidden state into its logits.
    """
    ids = short_texts(model, 1, 8).repeat(2, 1)
    ids[1, -1] = ids[1, 0]
    if ids[1, -1] == ids[0, -1]:
        ids[1, -1] = ids[1, 1]
    seen: list[torch.Size] = []
    last = model.get_output_embeddings()
    handle = None
    if isinstance(last, torch.nn.Module):
        handle = last.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    try:
        logits = read(model, ids)[:, :-1]
    except ValueError as error:
        raise ModelError(f"cannot use the model {name!r}: {in_short(error)}") from error
    finally:
        if handle is not None:
            handle.remove()
    if [shape[:-1] for shape in seen] != [ids.shape]:
        raise ModelError(
            f"the model {name!r} ({type(model).__name__}) does not make its logits of one hidden "
            "state for each token, which the loss on answers needs"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"the model {name!r} computes no numbers: {_first_without_numbers(model)}")
    if not agree(logits[1], logits[0]):
        raise ModelError(
            f"the model {name!r} ({type(model).__name__}) sees the tokens that follow, so it "
            "cannot learn to write them; expected a causal language model (an encoder serves for "
            "data with labels)"
        )


def _first_without_numbers(model: PreTrainedModel) -> str:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"its tensor {name} holds values that are not finite"
    return "its logits are not finite for a short text"


def require_room_for_tokens(
    tokenizer: PreTrainedTokenizerBase, name: str, rows: int | None
) -> None:
    """Raise ModelError where a tokenizer has tokens that the model has no embedding for.

    A token that was only added, that no chat template writes and that begins, ends or fills no
    text does no harm as long as no text has it, which `require_known_ids` tells.
    """
    if rows is None:
        return
    beyond = {token: at for token, at in tokenizer.get_vocab().items() if at >= rows}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    roles = {
        str(getattr(tokenizer, role))
        for role in ("bos_token", "eos_token", "pad_token", "sep_token", "cls_token")
    }
    template = str(tokenizer.chat_template or "")
    needed = [
        token for token in beyond if token not in added or token in roles or token in template
    ]
    if needed:
        token = max(needed, key=beyond.__getitem__)
        raise ModelError(
            f"the tokenizer of {name!r} has {max(beyond.values()) + 1} tokens, but the model an "
            f"embedding for {rows}: {token!r} ({beyond[token]}) and others have none; expected the "
            "tokenizer that the model was trained with"
        )


def require_known_ids(
    tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], rows: int | None, where: str
) -> None:
    """Raise ModelError for a text with a token that the model has no embedding for."""
    most = max(ids, default=0)
    if rows is not None and most >= rows:
        token = tokenizer.convert_ids_to_tokens(most)
        raise ModelError(
            f"{where}: the token {token!r} ({most}) is in the text, but the tokenizer has "
            f"{len(tokenizer)} tokens and the model an embedding for {rows}"
        )


def require_reads_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a classifier that does not read what its tokenizer makes of a text.

    T5's and BART's look for the token that ends one.
    """
    ids = torch.tensor([tokenizer("a b c")["input_ids"]], device=model.device)
    try:
        read(model, ids)
    except ValueError as error:
        raise ValueError(
            f"it does not read what its tokenizer makes of a text ({error.__cause__}); expected "
            "the tokenizer that it was trained with, which may end a text by a token of its own"
        ) from error


def note_on_padding(model: PreTrainedModel) -> tuple[str, ...]:
    """What a user should know of a classifier that does not overlook padding behind a text."""
    ids = short_texts(model, 1, 8)
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    behind = torch.cat([ids, torch.full_like(ids[:, :5], 0 if pad is None else pad)], 1)
    mask = torch.ones_like(behind)
    mask[:, ids.shape[1] :] = 0
    if agree(read(model, behind, mask), read(model, ids)):
        return ()
    return (
        "what this model makes of a text changes with the padding behind it, so with the texts it "
        "shares a batch with; --batch-size 1 and --eval-batch-size 1 keep texts apart",
    )


@torch.no_grad()
def bears_padding_before(model: PreTrainedModel) -> bool:
    """Whether a prompt that is padded on its left goes on as it does alone, which is tried.

    Not where positions are counted from the row's beginning, nor where a recurrence reads padding.
    """
    ids = short_texts(model, 1, 8)
    padded = torch.cat([torch.full_like(ids[:, :3], int(ids[0, 0])), ids], 1)
    mask_of_padded = torch.ones_like(padded)
    mask_of_padded[:, :3] = 0
    try:
        alone, behind = (
            model.generate(
                input_ids=row,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    max_new_tokens=2,
                    min_new_tokens=2,
                    do_sample=False,
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                ),
            ).logits
            for row, mask in ((ids, torch.ones_like(ids)), (padded, mask_of_padded))
        )
    except Exception:  # a foreign network may fail at this anyhow; prompts then go one by one
        return False
    return all(map(agree, behind, alone))
