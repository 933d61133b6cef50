"""A proxy of the environment is named where it stands in the way, and never before this machine."""

from pathlib import Path
from urllib.request import proxy_bypass

import httpx
import pytest
from machines import found

pytest.importorskip("flwr")

from fedalt.flower import supervisor
from fedalt.flower.config import read_server_config
from fedalt.flower.fleet_client import server_trouble
from fedalt.flower.proxies import reach_loopback_directly, through_proxy

NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
DEAD = "http://anna:secret@127.0.0.1:9"  # nothing listens on the discard port


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
        monkeypatch.setenv(name.lower(), "")
        monkeypatch.delenv(name.lower())


@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY", "http_proxy"])
def test_the_proxy_is_named_with_the_way_round_it(monkeypatch, name):
    monkeypatch.setenv(name, DEAD)
    said = server_trouble("192.0.2.1:8443", None)
    assert "192.0.2.1:8443 cannot be reached" in said
    assert f"through the proxy 127.0.0.1:9 that {name.upper()} names" in said
    assert "NO_PROXY=192.0.2.1" in said
    assert "secret" not in said


def test_the_proxy_of_encrypted_connections_is_another_variable(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", DEAD)
    assert "HTTPS_PROXY" in through_proxy("server.example:8443", secure=True)
    assert through_proxy("server.example:8443", secure=False) == ""
    monkeypatch.setenv("NO_PROXY", "server.example")
    assert through_proxy("server.example:8443", secure=True) == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_this_machine_is_reached_without_a_proxy(monkeypatch, host):
    for name in NAMES[:3]:
        monkeypatch.setenv(name, DEAD)
    monkeypatch.setenv("NO_PROXY", "other.example")
    reach_loopback_directly(host.strip("[]"))
    with httpx.Client() as client:
        direct = client._transport_for_url(httpx.URL(f"http://{host}:8443/"))
        far = client._transport_for_url(httpx.URL("http://far.example/"))
        other = client._transport_for_url(httpx.URL("http://other.example/"))
        assert direct is client._transport is other
        assert far is not client._transport
    assert through_proxy(f"{host}:8443", secure=True) == ""


def test_the_servers_processes_reach_each_other_without_a_proxy(
    monkeypatch, tmp_path: Path, tiny_model_dir: Path
):
    config = read_server_config(found(tmp_path, tiny_model_dir, "ab").server / "federation.toml")
    monkeypatch.setenv("HTTPS_PROXY", DEAD)
    seen = []

    def live(*_: object) -> None:
        seen.append(proxy_bypass("127.0.0.1"))
        config.place.ended.touch()

    monkeypatch.setattr(supervisor._Supervision, "live", live)
    supervisor.supervise(config, lambda _: None)
    assert seen == [True]
