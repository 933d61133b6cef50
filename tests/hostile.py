"""Answers and calls that mean harm, made of honest ones: deterministic by seed, wrong for sure.

They are changed in their plain form, which is what the codec's JSON holds, so that types and fields
can be wrong that no dataclass of ours would take; tensors and bytes are changed too.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalt.core.container import pack, unpack

SCORE = "score"
COST = "cost"
MESSAGE = "message"
HUGE = 1e30  # a number that is finite; with a norm limit it is still far too large
ODD: tuple[object, ...] = ({"float": "nan"}, {"float": "inf"}, {"float": "-inf"}, -1.0, -1e6, 1e300)
LONGEST = 10**4300 - 1  # the largest int that Python reads; with 1 added it writes it no more
WRONG_ROUNDS = (-5, -1, 999_999, 10**30, LONGEST)


@dataclass
class Opened:
    """Encoded bytes taken apart: the class's name, the plain form, the tensors by their keys."""

    label: str
    plain: dict[str, Any]
    tensors: dict[str, Tensor]

    @staticmethod
    def of(data: bytes) -> "Opened":
        """The parts of honest bytes, new every time."""
        content, tensors = unpack(data)
        return Opened(content["class"], content["facts"], tensors)

    def packed(self) -> bytes:
        """Bytes whose checksum is right."""
        return pack({"class": self.label, "facts": self.plain}, self.tensors)

    def message(self, field: str) -> dict[str, Any]:
        """The plain form of an upload or a broadcast."""
        found: dict[str, Any] = self.plain[field][MESSAGE]
        return found

    def items(self, field: str, label: str) -> list[dict[str, Any]]:
        """The plain forms of scores or costs."""
        return [each[label] for each in self.plain[field]]


Change = Callable[[Opened, random.Random], None]
Spoil = Callable[[bytes, random.Random], bytes]


class NotHere(Exception):  # noqa: N818 - nothing is wrong
    """What is to be changed is not part of these bytes."""


def spoilt(data: bytes, kinds: Mapping[str, Spoil], rng: random.Random) -> tuple[str, bytes]:
    """The name of a kind, and honest bytes that were made so; another kind if one does not fit."""
    names = sorted(kinds)
    while True:
        name = rng.choice(names)
        try:
            return name, kinds[name](data, rng)
        except NotHere:
            continue


def _changed(change: Change) -> Spoil:
    def spoil(data: bytes, rng: random.Random) -> bytes:
        opened = Opened.of(data)
        change(opened, rng)
        return opened.packed()

    return spoil


def _some(items: list[Any], rng: random.Random) -> Any:
    if not items:
        raise NotHere
    return rng.choice(items)


# Fields of either


def _field_missing(it: Opened, rng: random.Random) -> None:
    del it.plain[rng.choice(sorted(it.plain))]


def _field_extra(it: Opened, rng: random.Random) -> None:
    it.plain[rng.choice(["x", "Round", "__class__", "scores2"])] = 1


def _field_type(it: Opened, rng: random.Random) -> None:
    key = rng.choice(sorted(it.plain))
    old = it.plain[key]
    wrong: list[Any] = [1.5, [[[]]], {"a": {}}, [None] * 3]
    if not isinstance(old, bool):
        wrong.append(True)
    if not isinstance(old, str):
        wrong.append("x")
    if isinstance(old, int | str):
        wrong.append(None)
    it.plain[key] = rng.choice(wrong)


def _nested(it: Opened, rng: random.Random) -> None:
    deep: Any = []
    for _ in range(rng.choice([50, 300])):
        deep = [deep]
    it.plain[rng.choice(sorted(it.plain))] = deep


def _label(it: Opened, rng: random.Random) -> None:
    it.label = rng.choice(["", "builtins.dict", "os.system", MESSAGE, it.label.lower() + "x"])


def _sender(it: Opened, rng: random.Random) -> None:
    it.plain[rng.choice(["federation", "terms", "client"])] = rng.choice(["", "b", "x" * 10_000])


# Tensors of an upload or a broadcast


def _tensors(field: str, *, huge: bool) -> Change:
    def change(it: Opened, rng: random.Random) -> None:
        keys = [key for key in sorted(it.tensors) if key.startswith(f"{field}/")]
        key = _some(keys, rng)
        tensor = it.tensors[key]
        how = rng.choice(
            ["nan", "inf", "shape", "dims", "dtype", "missing", "extra", "name", "empty"]
            + ["huge"] * huge
        )
        match how:
            case "nan" | "inf":
                spot = rng.randrange(tensor.numel())
                tensor.view(-1)[spot] = float(how)
            case "huge":
                it.tensors.update({each: torch.full_like(it.tensors[each], HUGE) for each in keys})
            case "shape":
                it.tensors[key] = tensor.repeat(2, 1) if tensor.dim() == 2 else tensor.repeat(2)
            case "dims":
                it.tensors[key] = tensor[None]
            case "dtype":
                it.tensors[key] = tensor.to(torch.float16)
            case "empty":
                it.tensors[key] = tensor[:0]
            case "missing":
                del it.tensors[key]
                it.message(field)["tree"] = {"tree": len(keys) - 1}
            case "extra":
                it.tensors[key + "x"] = tensor.clone()
                it.message(field)["tree"] = {"tree": len(keys) + 1}
            case "name":
                it.tensors[key + "x"] = it.tensors.pop(key)

    return change


def _tree_count(field: str) -> Change:
    def change(it: Opened, rng: random.Random) -> None:
        if not it.plain.get(field):
            raise NotHere
        it.message(field)["tree"] = rng.choice([{"tree": 10**9}, {"tree": -1}, {}, {"tree": True}])

    return change


def _facts(field: str) -> Change:
    def change(it: Opened, rng: random.Random) -> None:
        if not it.plain.get(field):
            raise NotHere
        facts = it.message(field)["facts"]["mapping"]
        key = _some(sorted(facts), rng)
        how = rng.choice(["missing", "extra", "type", "odd"])
        match how:
            case "missing":
                del facts[key]
            case "extra":
                facts["x"] = 1
            case "type":
                facts[key] = 1 if isinstance(facts[key], bool | str | float) else "x"
            case "odd" if isinstance(facts[key], bool | str):
                raise NotHere
            case "odd" if isinstance(facts[key], int):
                facts[key] = rng.choice([-7, 10**10, -(10**9), 10**30])
            case "odd":
                facts[key] = rng.choice([*ODD[:3], -1.0, -1e9])

    return change


# Bytes


def _bytes(data: bytes, rng: random.Random) -> bytes:
    match rng.choice(["cut", "more", "flip", "random", "empty", "head", "json"]):
        case "cut":
            return data[: rng.randrange(len(data))]
        case "more":
            return data + rng.randbytes(rng.randrange(1, 1000))
        case "flip":  # whatever is hit, the checksum does not fit any more
            at = rng.randrange(len(data))
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        case "random":
            return rng.randbytes(rng.randrange(1, 2000))
        case "head":
            return rng.randbytes(8) + data[8:]
        case "json":
            return b"[" * 10_000
        case _:
            return b""


# Scores and costs of an answer


def _listed(field: str, label: str) -> Change:
    """Too few, too many, twice, of a column or with a field that is none."""

    def change(it: Opened, rng: random.Random) -> None:
        listed = it.plain[field]
        how = rng.choice(["twice", "column", "fields", "unasked", "few", "none"])
        if how == "unasked":
            about: dict[str, Any] = {"column": "own", "metrics": {"mapping": {"loss": 1.0}}}
            beside = {"split": "validation", "round": 0} if label == SCORE else {"seconds": 1.0}
            listed.append({label: about | beside})
            return
        each = _some(listed, rng)
        match how:
            case "twice":
                listed.append(each)
            case "column":
                each[label]["column"] = rng.choice(["", "own2", "x" * 5000])
            case "fields":
                del each[label][rng.choice(sorted(each[label]))]
            case "none" if field == "costs":
                listed.clear()
            case _ if len(listed) > 1:
                listed.remove(each)
            case _:
                raise NotHere

    return change


def _metrics(field: str, label: str) -> Change:
    def change(it: Opened, rng: random.Random) -> None:
        found = _some(it.items(field, label), rng)["metrics"]["mapping"]
        key = _some(sorted(found), rng)
        match rng.choice(["none", "missing", "unknown", "odd", "type"]):
            case "none":
                found.clear()
            case "missing":
                del found[key]
            case "unknown":
                found[rng.choice(["x", "Loss", "perplexity"])] = 0.5
            case "odd":
                found[key] = rng.choice(ODD)
            case "type":
                found[key] = rng.choice([1, True, "0.1", None, [0.1], {"mapping": {}}])

    return change


def _score_about(it: Opened, rng: random.Random) -> None:
    each = _some(it.items("scores", SCORE), rng)
    if rng.random() < 0.3:
        each["split"] = {"validation": "test", "test": "validation"}[each["split"]]
    else:
        each["round"] = rng.choice([*WRONG_ROUNDS, each["round"] + 1, each["round"] - 1])


def _cost_numbers(it: Opened, rng: random.Random) -> None:
    each = _some(it.items("costs", COST), rng)
    if rng.random() < 0.5:
        each["seconds"] = rng.choice(ODD)
    else:
        each["metrics"]["mapping"][rng.choice(["steps", "tokens"])] = rng.choice([0.5, 1e17, -2.0])


def _answer_about(it: Opened, rng: random.Random) -> None:
    key = rng.choice(["round", "accepted", "call"])
    if key == "call":
        it.plain[key] = rng.choice(["", "0" * 32, it.plain["call"][::-1] + "0"])
    else:
        it.plain[key] = rng.choice([*WRONG_ROUNDS[2:], -5, it.plain[key] + 1, it.plain[key] - 1])


def _error(it: Opened, rng: random.Random) -> None:
    how = rng.choice(["beside", "long", "control"])
    if how != "beside":
        it.plain |= {"upload": None, "scores": [], "costs": []}
        it.tensors.clear()
    it.plain["error"] = {"beside": "no memory", "long": "x" * 10**5, "control": "a\n\x1b[2Jb"}[how]


def _without_upload(it: Opened, rng: random.Random) -> None:
    if it.plain["upload"] is None:
        raise NotHere
    it.plain["upload"] = None
    it.tensors.clear()


_BOTH: Mapping[str, Spoil] = {
    "a field missing": _changed(_field_missing),
    "a field too many": _changed(_field_extra),
    "a field of another type": _changed(_field_type),
    "nested": _changed(_nested),
    "another class": _changed(_label),
    "another federation, client or terms": _changed(_sender),
    "bytes": _bytes,
}
ANSWERS: Mapping[str, Spoil] = {
    **_BOTH,
    "another round or call": _changed(_answer_about),
    "error": _changed(_error),
    "upload: none": _changed(_without_upload),
    "upload: tensors": _changed(_tensors("upload", huge=True)),
    "upload: count of tensors": _changed(_tree_count("upload")),
    "upload: facts": _changed(_facts("upload")),
    "scores: too few, too many": _changed(_listed("scores", SCORE)),
    "scores: metrics": _changed(_metrics("scores", SCORE)),
    "scores: round or split": _changed(_score_about),
    "costs: too few, too many": _changed(_listed("costs", COST)),
    "costs: metrics": _changed(_metrics("costs", COST)),
    "costs: numbers": _changed(_cost_numbers),
}


# Calls


def _call_round(it: Opened, rng: random.Random) -> None:
    rounds = it.plain["round"]
    it.plain["round"] = rng.choice([*WRONG_ROUNDS, rounds - 1, rounds - 2])


def _call_accepted(it: Opened, rng: random.Random) -> None:
    now = it.plain["accepted"]
    it.plain["accepted"] = rng.choice([-2, -(10**9), 10**30, LONGEST, it.plain["round"], now - 2])


def _call_columns(it: Opened, rng: random.Random) -> None:
    found = it.plain[rng.choice(["score", "keep"])]["mapping"]
    if found and rng.random() < 0.5:
        found[rng.choice(sorted(found))] = rng.choice([*WRONG_ROUNDS, it.plain["round"]])
    else:
        found[rng.choice(["shared", "", "x" * 3000, "own/../.."])] = 0


def _call_test(it: Opened, rng: random.Random) -> None:
    if it.plain["split"] == "test":
        raise NotHere
    it.plain["split"] = "test"
    if rng.random() < 0.5:
        it.plain["score"] = {"mapping": {"own": rng.choice([0, 1, 2, -1])}}


def _call_last(it: Opened, rng: random.Random) -> None:
    if it.plain["last"]:
        raise NotHere
    it.plain["last"] = True
    if rng.random() < 0.5:
        it.plain["train"] = True


def _call_nothing(it: Opened, rng: random.Random) -> None:
    if it.plain["last"]:
        raise NotHere
    it.plain |= {"train": False, "score": {"mapping": {}}}


CALLS: Mapping[str, Spoil] = {
    **_BOTH,
    "round": _changed(_call_round),
    "accepted": _changed(_call_accepted),
    "columns": _changed(_call_columns),
    "test": _changed(_call_test),
    "last": _changed(_call_last),
    "nothing": _changed(_call_nothing),
    "broadcast: tensors": _changed(_tensors("message", huge=False)),
    "broadcast: count of tensors": _changed(_tree_count("message")),
    "broadcast: facts": _changed(_facts("message")),
}
