"""How much a server holds of what it has read: no more than its memory has room for."""

import pytest
from bases import base_of, random_serving_tree
from test_serving_engine import PLANS, PROMPTS, Asked, alone, engine_of, text_of

from fedalt.methods.contract import Serving
from fedalt.serving import engine as engines
from fedalt.serving import memory
from fedalt.serving.batch import Adapters
from fedalt.serving.cache import longest_in, tokens_held
from fedalt.serving.errors import ApiError
from fedalt.serving.http import Service
from fedalt.serving.models import Models
from fedalt.serving.schema import TextAsked
from fedalt.serving.settings import ServeSettings


def adapters_of(base, name):
    plan = PLANS[name]
    return Adapters.of(base, name, Serving(plan, random_serving_tree(base, plan)))


def held_by(engine):
    """Tokens that there are buffers for, as the model sees them."""
    layers = [running.batch._columns.cache.layers for running in engine._batches.values()]
    shapes = [each[0].buffers[0].shape for each in layers if each]
    return sum(rows * columns for rows, _, columns, _ in shapes)


def test_who_finds_no_room_waits_and_no_buffers_are_larger_than_that(monkeypatch):
    base, room = base_of(), tokens_held(2, 30)
    monkeypatch.setattr(engines, "room_of", lambda _: room)
    names, engine, peak = ("mixer", "sum"), engine_of(base), []
    clients = {name: adapters_of(base, name) for name in names}
    asked = [Asked(clients[names[n % 2]], "ask me", 3 + n % 3) for n in range(9)]
    asked.insert(6, Asked(clients["mixer"], PROMPTS[2], 60))
    for each in asked:
        tell = each.request.tell
        each.request.tell = lambda *said, tell=tell: (peak.append(held_by(engine)), tell(*said))
        engine.submit(each.request)
    engine.start()
    found = [text_of(base, each.wait()) for each in asked]
    engine.close()
    assert found == [alone(base, each) for each in asked]
    assert max(peak) <= room


def test_a_long_text_brings_no_room_for_others_that_have_left():
    base = base_of()
    adapters, engine, peak = adapters_of(base, "mixer"), engine_of(base, rows=8), []
    for each in [Asked(adapters, "ask me", 2) for _ in range(8)]:
        engine.submit(each.request)
    short, long = Asked(adapters, "ask me", 40), Asked(adapters, PROMPTS[2], 60)
    engine.submit(short.request)
    tell = long.request.tell
    long.request.tell = lambda *said: (peak.append(held_by(engine)), tell(*said))
    engine.submit(long.request)
    engine.start()
    long.wait()
    engine.close()
    assert max(peak) <= tokens_held(2, len(long.request.prompt) + 60)


def test_memory_holds_as_many_tokens_as_a_third_of_what_is_free(monkeypatch):
    base = base_of()
    config = base.adapted.model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    monkeypatch.setattr(memory, "free_bytes", lambda _: 3 * 4 * numbers * 500)
    assert memory.room_of(base) == 500
    assert engine_of(base).longest == longest_in(500) == 500 - 64


def test_what_memory_never_holds_is_refused_with_what_it_does(monkeypatch):
    base = base_of()
    monkeypatch.setattr(engines, "room_of", lambda _: tokens_held(1, 30))
    service = Service(Models(base, 10, {}), engine_of(base), ServeSettings())
    assert service._most(TextAsked(model="a", prompt="a"), 25) == 5
    with pytest.raises(ApiError, match=r"25 tokens .* have 6, but the memory .* at most 30$"):
        service._most(TextAsked(model="a", prompt="a", max_tokens=6), 25)


def test_a_limit_of_a_container_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(f"{2**60}\n")
    free = memory.free_bytes(base_of().adapted.device)
    assert free > 0
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("", (), {"available": 2**62}))
    assert 2**59 < memory.free_bytes(base_of().adapted.device) < 2**60
