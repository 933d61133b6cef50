"""What lies in deploy/ for service managers and clusters."""

import contextlib
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedalt.flower.credentials import make_authority, require_server_credentials

DEPLOY = Path(__file__).parents[1] / "deploy"
INSTALLED = "/opt/fedalt/bin/fedalt"
SBATCH = DEPLOY / "client.sbatch"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
@pytest.mark.parametrize("unit", sorted(DEPLOY.glob("*.service")), ids=lambda unit: unit.name)
def test_systemd_takes_the_units(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text()
    assert INSTALLED in text
    copy = tmp_path / unit.name.replace("@.", "@berlin.")
    copy.write_text(text.replace(INSTALLED, sys.executable))  # a program that is there
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_takes_the_slurm_script() -> None:
    subprocess.run(["bash", "-n", SBATCH], check=True)


def has_openssl_3() -> bool:
    if shutil.which("openssl") is None:
        return False
    version = subprocess.run(["openssl", "version"], capture_output=True, text=True).stdout
    return int(version.split()[1].partition(".")[0]) >= 3


@pytest.mark.skipif(not has_openssl_3(), reason="there is no OpenSSL 3")
def test_the_documents_commands_make_certificates_that_server_and_clients_take(
    tmp_path: Path,
) -> None:
    document = (DEPLOY.parent / "docs" / "deployment.md").read_text()
    authority = tmp_path / "clinics" / "authority"
    authority.mkdir(parents=True)
    make_authority(authority, "clinics")
    for command in ("openssl req", "openssl x509"):
        code = document[document.index(command) :].partition("```")[0]
        subprocess.run(["bash", "-c", code], cwd=tmp_path, check=True)
    certificate, key = tmp_path / "server.crt", tmp_path / "server.key"
    renewed = tmp_path / "ca.crt"
    assert renewed.read_bytes() != (authority / "ca.crt").read_bytes()
    for trusted in (authority / "ca.crt", renewed):
        require_server_credentials(certificate, key, trusted)
        assert handshake(certificate, key, trusted) == "TLSv1.3"


def handshake(certificate: Path, key: Path, trusted: Path) -> str | None:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(trusted))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="10.0.0.5"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for end in ends * 2:  # an end that still waits for the other one says so
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return ends[0].version()


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """A `fedalt` that waits to be stopped, or ends at once, and a `scontrol` that takes notes."""
    programs = {
        "fedalt": 'echo "$@" > words\n[ -e ended ] && exit 0\n[ -e wrong ] && exit 2\n'
        "trap 'exit 130' TERM\ntouch waits\nwhile true; do sleep 0.02; done\n",
        "scontrol": 'echo "$@" > requeued\n',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o700)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


def test_before_its_time_is_over_a_client_on_a_cluster_is_stopped_and_queued_again(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    job = subprocess.Popen(["bash", SBATCH, "berlin"], cwd=tmp_path, env=cluster)
    while not (tmp_path / "waits").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    assert (tmp_path / "words").read_text() == "client --config berlin/client.toml\n"
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("how", "code"), [("ended", 0), ("wrong", 2)])
def test_a_client_on_a_cluster_that_has_ended_is_not_queued_again(
    tmp_path: Path, cluster: dict[str, str], how: str, code: int
) -> None:
    (tmp_path / how).touch()
    assert subprocess.run(["bash", SBATCH, "berlin"], cwd=tmp_path, env=cluster).returncode == code
    assert not (tmp_path / "requeued").exists()
