"""`fedalt serve` as a process of its own, asked by OpenAI's client and by worse ones."""

import json
import shutil
import socket
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from commands import call
from runs_for_tests import settings_for
from serving import serving

import fedalt
from fedalt.evaluation import Scoring, generate
from fedalt.runs import lifecycle
from fedalt.runs.answers import answers, load_run_parts, prompt_of, served, servings_now
from fedalt.runs.settings import to_toml

TOKEN = "a-token-of-the-test"
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}
SECRET = "abracadabra"
LONG = 50


@pytest.fixture(scope="module")
def server(finished_run, tmp_path_factory):
    """A server with limits that a test can reach; it has told nobody's text at the end."""
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN + "\n")
    limits = ("--rows", 4, "--max-bytes", 4000, "--max-tokens", LONG, "--queue", 16)
    with serving(finished_run, "--token-file", file, *limits) as running:
        yield running
        assert running.end() == 0
        assert SECRET not in running.said
        assert running.said.count("\n") == 1


@pytest.fixture(scope="module")
def client(server):
    return server.client(TOKEN)


@pytest.fixture(scope="module")
def models(finished_run):
    """What each client serves, on one base model, which the base model's own is as well."""
    first = served(finished_run, "a")
    others = {name: served(finished_run, name, base=first.parts.base) for name in "bc"}
    return {"a": first, **others}


def expected(models, name, text, most):
    """What `fedalt generate` says, greedily; "base" without an adapter."""
    of = models.get(name, models["a"])
    scoring = Scoring(max_new_tokens=most)
    if name in models:
        return answers(of, [text], scoring)[0]
    return generate(of.parts.base, None, [prompt_of(of, text)], scoring)[0]


def ask(client, name, text, most=10, **how):
    said = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": text}], max_tokens=most, **how
    )
    return said if how.get("stream") else said.choices[0].message.content


def test_the_models_are_the_clients_and_the_base_model(client):
    assert {model.id for model in client.models.list()} == {"a", "b", "c", "base"}
    assert client.models.retrieve("a").id == "a"


def test_clients_at_once_get_what_generate_writes_for_each(client, models):
    asked = [
        (name, f"ask {n}{name[:1]}", 4 + n) for n in range(4) for name in ("a", "b", "c", "base")
    ]
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda each: ask(client, *each), asked[:12]))
        found += threads.map(lambda each: ask(client, *each), asked[12:])
    assert found == [expected(models, *each) for each in asked]
    assert len(set(found)) > 6


def test_a_stream_says_the_same_in_pieces_and_counts(client):
    whole = client.chat.completions.create(
        model="b", messages=[{"role": "user", "content": "ask 7b"}], max_tokens=9
    )
    pieces = list(
        ask(client, "b", "ask 7b", 9, stream=True, stream_options={"include_usage": True})
    )
    *parts, last = pieces
    assert "".join(part.choices[0].delta.content for part in parts) == (
        whole.choices[0].message.content
    )
    assert len(parts) > 2
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert last.usage == whole.usage
    assert whole.usage.completion_tokens == 9
    assert whole.usage.total_tokens == 9 + whole.usage.prompt_tokens


def test_a_stop_sequence_ends_an_answer_and_is_no_part_of_it(client):
    whole = ask(client, "c", "ask 3c", 20)
    stop = whole[4:6]
    before = whole[: whole.index(stop)].rstrip()
    assert ask(client, "c", "ask 3c", 20, stop=[stop, "never"]) == before
    parts = list(ask(client, "c", "ask 3c", 20, stop=stop, stream=True))
    assert "".join(part.choices[0].delta.content for part in parts) == before
    assert parts[-1].choices[0].finish_reason == "stop"


def test_a_text_goes_on_as_it_is_and_a_seed_repeats_an_answer(client, models):
    def complete(**how):
        said = client.completions.create(model="a", prompt="what is", max_tokens=12, **how)
        return said.choices[0].text

    base = models["a"].parts.base
    ids = tuple(base.tokenizer("what is")["input_ids"])
    greedy = generate(base, models["a"].serving, [ids], Scoring(max_new_tokens=12))[0]
    assert complete().strip() == greedy
    seeded = [complete(temperature=1.5, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


WRONG = {
    "an unknown model": ({"model": "nobody"}, 404, "model_not_found", "no model 'nobody'"),
    "an empty prompt": ({"prompt": ""}, 400, "empty_prompt", "the prompt is empty"),
    "a prompt too long": ({"prompt": "a" * 61}, 400, "context_length_exceeded", "61 tokens"),
    "no prompt": ({"prompt": None}, 400, "invalid_value", "prompt: Input should be"),
    "too many tokens": ({"max_tokens": LONG + 1}, 400, "invalid_value", f"at most {LONG}"),
    "no tokens": ({"max_tokens": 0}, 400, "invalid_value", "max_tokens: "),
    "true tokens": ({"max_tokens": True}, 400, "invalid_value", "max_tokens: "),
    "tokens as a text": ({"max_tokens": "5"}, 400, "invalid_value", "max_tokens: "),
    "heat as a text": ({"temperature": "1"}, 400, "invalid_value", "temperature: "),
    "heat": ({"temperature": 3}, 400, "invalid_value", "less than or equal to 2"),
    "two answers": ({"n": 2}, 400, "unsupported", "n: this server cannot do that"),
    "no others' logprobs": ({"logprobs": 0}, 400, "unsupported", "logprobs: this server"),
    "an unknown wish": ({"tools": [{}]}, 400, "unsupported", "tools: "),
    "no model": ({"model": None}, 400, "invalid_value", "model: "),
    "an empty stop": ({"stop": ["a", ""]}, 400, "invalid_value", "stop.1: String should have"),
    "no UTF-8": ({"prompt": "\ud800"}, 400, "invalid_value", "prompt: "),
}


def post(server, content, path="/v1/completions", token=TOKEN, **headers):
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", **headers}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=60)


def error_of(answer):
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["message"]


@pytest.mark.parametrize(("change", "status", "code", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_request_gets_a_sentence(server, change, status, code, said):
    body = {"model": "a", "prompt": "ask", "max_tokens": 5, **change}
    told = error_of(post(server, json.dumps(body)))
    assert told[:2] == (status, code)
    assert said in told[2]


def test_what_a_message_says_beside_its_text_is_refused_by_name(server, client):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for at, name, value in ((1, "tool_calls", [call]), (0, "name", "anna")):
        asked = [dict(turn) for turn in turns]
        asked[at][name] = value
        told = error_of(
            post(server, json.dumps({"model": "a", "messages": asked}), path="/v1/chat/completions")
        )
        wanted = f"messages.{at}.{name}: this server cannot do that"
        assert told == (400, "unsupported", wanted)
    whole = client.chat.completions.create(
        model="a", messages=[{"role": "user", "content": "ask", "name": None}], max_tokens=3
    )
    assert whole.choices[0].message.content == ask(client, "a", "ask", 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (5, "messages.0.content: expected a text, or a list of parts of type 'text'"),
        ([{"type": "image_url"}], "messages.0.content.0.type: Input should be 'text'"),
    ],
)
def test_content_that_is_no_text_is_told_with_what_may_stand_there(server, content, said):
    asked = {"model": "a", "messages": [{"role": "user", "content": content}]}
    told = error_of(post(server, json.dumps(asked), path="/v1/chat/completions"))
    assert told == (400, "invalid_value", said)


def test_what_is_no_request_gets_a_sentence(server, client):
    assert error_of(post(server, '{"model": "a", '))[:2] == (400, "invalid_json")
    for content in ("[1]", ""):
        assert error_of(post(server, content)) == (
            400,
            "invalid_value",
            "expected a JSON object, with Content-Type: application/json",
        )
    assert error_of(post(server, b'{"model": "\xff"}'))[1:] == (
        "invalid_json",
        "the request cannot be read; expected JSON in UTF-8",
    )
    assert error_of(post(server, "{}"))[2] == "model: it is missing"
    assert error_of(post(server, "{}", path="/v1/nothing"))[:2] == (404, "not_found")
    assert error_of(post(server, "{}", token="wrong"))[:2] == (401, "invalid_api_key")
    assert error_of(post(server, " " * 4001))[:2] == (413, "request_too_large")
    assert error_of(post(server, iter([b" " * 3000] * 2)))[:2] == (413, "request_too_large")
    for method, path, allowed in (
        ("GET", "/v1/completions", {"POST"}),
        ("OPTIONS", "/v1/chat/completions", {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("PUT", "/health", {"GET", "HEAD"}),
    ):
        refused = httpx.request(method, server.url + path, headers=AUTHORISED, timeout=60)
        assert error_of(refused)[::2] == (405, "this path takes another method")
        assert set(refused.headers["allow"].split(", ")) == allowed
    for path in ("/health", "/metrics", "/v1/models", "/v1/models/a"):
        told = httpx.head(server.url + path, headers=AUTHORISED, timeout=60)
        assert (told.status_code, told.content) == (200, b"")
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="no model 'nobody'"):
        ask(client, "nobody", "ask")
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    with pytest.raises(openai.BadRequestError, match="expected one message"):
        client.chat.completions.create(model="a", messages=turns)
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        ask(client, "a", "  ")


def metrics(server):
    text = post_get(server, "/metrics").text
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("fedalt_"): int(value) for name, value in rows}


def post_get(server, path):
    return httpx.get(server.url + path, headers=AUTHORISED)


def test_who_hangs_up_makes_room_and_nothing_is_lost(server, client, models):
    body = {"model": "a", "prompt": f"{SECRET} x", "max_tokens": 40, "stream": True}
    address = server.url.removeprefix("http://").split(":")
    written = metrics(server)["written_tokens_total"]
    for wanted in (True, False) * 4:
        text = json.dumps({**body, "stream": wanted})
        with socket.create_connection((address[0], int(address[1]))) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
            raw.sendall((head + text).encode())
            if wanted:
                assert b"200 OK" in raw.recv(100)
    assert ask(client, "b", "ask 5b") == expected(models, "b", "ask 5b", 10)
    for _ in range(100):
        if not (now := metrics(server))["requests_running"] + now["requests_waiting"]:
            break
        time.sleep(0.1)
    assert now["requests_running"] == now["requests_waiting"] == 0
    assert now["written_tokens_total"] - written < 8 * 40  # they were not written to the end
    assert now["rows_total"] > now["passes_total"] > 0
    assert now['responses_total{status="200"}'] > 10
    assert httpx.get(f"{server.url}/health").text == "ok\n"
    assert httpx.get(f"{server.url}/metrics").status_code == 401


def test_more_than_may_wait_are_told_to_come_again(server):
    body = json.dumps({"model": "a", "prompt": "ask", "max_tokens": LONG})
    with ThreadPoolExecutor(40) as threads:
        found = list(threads.map(lambda _: post(server, body), range(40)))
    statuses = {answer.status_code for answer in found}
    assert statuses == {200, 429}
    full = next(answer for answer in found if answer.status_code == 429)
    assert error_of(full)[1] == "queue_full"
    assert full.headers["retry-after"] == "1"


def test_a_port_in_use_and_a_folder_that_cannot_be_served_are_told(finished_run, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert call("serve", finished_run, "--port", port) == 2
    assert f"port {port}: Address already in use; --port and --host" in capsys.readouterr().err
    assert call("serve", tmp_path, "--port", 0) == 2
    assert "is not a run's folder" in capsys.readouterr().err
    assert call("serve", finished_run, "--host", "0.0.0.0") == 2
    assert "--token-file FILE names a file" in capsys.readouterr().err
    file = tmp_path / "good"
    file.write_text(TOKEN)
    assert call("serve", finished_run, "--host", "ä" * 70, "--token-file", file) == 2
    assert "it is no name of a machine; --port and --host" in capsys.readouterr().err
    assert call("serve", finished_run, "--queue", 0) == 2  # which would refuse everything
    assert "at least 1" in capsys.readouterr().err
    (tmp_path / "token").write_text("two words")
    assert call("serve", finished_run, "--token-file", tmp_path / "token") == 2
    assert "expected one word" in capsys.readouterr().err


def test_a_new_best_round_is_taken_over_and_a_signal_lets_answers_end(
    run_flags, tmp_path, finished_run
):
    run = tmp_path / "run"
    flags = ("--rounds", 1, "--select", "last", "--no-local-baseline", "--quiet")
    assert call("run", *run_flags, *flags, "--out", run) == 0
    with serving(run, "--max-tokens", 40) as server:
        client = server.client()
        assert (
            ask(client, "a", "ask 1a", 20)
            == answers(served(run, "a"), ["ask 1a"], Scoring(max_new_tokens=20))[0]
        )
        settings = run / "settings.toml"
        settings.write_text(settings.read_text().replace("rounds = 1", "rounds = 3"))
        assert call("resume", run, "--quiet") == 0
        server.wait_for("another round is the best now")
        after = answers(served(run, "a"), ["ask 1a"], Scoring(max_new_tokens=20))[0]
        assert ask(client, "a", "ask 1a", 20) == after
        assert (
            httpx.get(server.url + "/health", headers={"Host": "evil.example"}).status_code == 421
        )
        whole = answers(served(run, "a"), ["ask 1a"], Scoring(max_new_tokens=25))[0]
        stream = ask(client, "a", "ask 1a", 25, stream=True)
        first = next(iter(stream))
        server.process.terminate()
        text = "".join(part.choices[0].delta.content for part in (first, *stream))
        assert text == whole
        assert server.process.wait(120) == 0


def test_a_rounded_broadcast_is_served_as_it_is_generated_with(
    tiny_model_dir, clients_dir, tmp_path
):
    settings = settings_for(
        tiny_model_dir, clients_dir, rounds={"rounds": 2}, traffic={"download": "int4"}
    )
    run = fedalt.run(tomllib.loads(to_toml(settings)), out=tmp_path / "run").path
    parts = load_run_parts(run)
    _, found = servings_now(parts, run, ["a", "b"], lambda act: act())
    for client, own in found.items():
        wanted = lifecycle.serving(parts, run, client, "own").tree
        assert own.tree.keys() == wanted.keys()
        assert all(torch.equal(own.tree[name], wanted[name]) for name in wanted)


def test_exported_models_are_served_together(finished_run, models, tmp_path, capsys):
    for client in "ab":
        out = tmp_path / "exports" / client
        assert call("export", finished_run, "--client", client, "--out", out) == 0
    with serving(tmp_path / "exports") as server:
        client = server.client()
        assert {model.id for model in client.models.list()} == {"a", "b", "base"}
        for name in ("a", "b", "base"):
            assert ask(client, name, "ask 9", 12) == expected(models, name, "ask 9", 12)
        assert server.end() == 0
    config = json.loads((tmp_path / "exports" / "b" / "adapter_config.json").read_text())
    shutil.copytree(tmp_path / "exports", tmp_path / "old")
    file = tmp_path / "old" / "b" / "adapter_config.json"
    file.write_text(json.dumps({**config, "asked": None}))
    capsys.readouterr()
    assert call("serve", tmp_path / "old", "--port", 0) == 2
    assert "`fedalt export` writes it anew" in capsys.readouterr().err
