"""Who is refused: nodes without a registered key, clients with another authority, clients without encryption."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
from secured import Secured

from fedsim import deployment, keys
from fedsim.flower import flower_environment, write_connection
from fedsim.processes import find_command, free_port

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of somebody else: an authority, a link and a node of the same name."""
    folder = tmp_path_factory.mktemp("stranger")
    keys.make_authority(folder)
    keys.make_certificate(folder, [])
    keys.make_node_key(folder, "node-0")
    return folder


def start_node(secured: Secured, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Start a SuperNode that gives up when it cannot connect; one that can would run into the time limit."""
    command = [find_command("flower-supernode"), "--superlink", address(secured), "--port", str(free_port())]
    environment = flower_environment() | {"FLWR_HOME": str(folder / "home")}
    return subprocess.run(
        [*command, "--isolation", "process", "--max-retries", "1", *options],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def address(secured: Secured) -> str:
    return deployment._read(secured.folder).address


def ours(secured: Secured) -> Path:
    return secured.folder / "keys"


def trusting(*options: str, authority: Path) -> list[str]:
    return ["--root-certificates", str(authority / "ca.crt"), *options]


def ask(secured: Secured, authority: Path, name: str) -> int:
    """Ask the link over TLS, as a client who trusts an authority and expects a certificate for a name."""
    context = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    host, port = address(secured).rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=name) as secure,
    ):
        secure.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return int(secure.recv(100).split()[1])


# ------------------------------------------------------------------------------------------------ keys


@pytest.mark.parametrize("key", ["of somebody else", "none"])
def test_a_node_without_a_registered_key_is_refused(
    key: str, secured: Secured, stranger: Path, tmp_path: Path
) -> None:
    before = secured.nodes()
    own = ["--auth-supernode-private-key", str(stranger / "node-0.key")] if key != "none" else []
    done = start_node(secured, tmp_path, *trusting(*own, authority=ours(secured)))
    assert done.returncode != 0
    assert "could not establish a connection" in done.stdout + done.stderr, done
    assert secured.nodes() == before


def test_a_node_whose_key_was_removed_is_refused(secured: Secured, tmp_path: Path) -> None:
    keys.make_node_key(tmp_path, "guest")
    environment = secured.environment()

    def tell(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [find_command("flwr"), "supernode", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )

    before = secured.nodes()
    tell("register", str(tmp_path / "guest.pub"), "fedsim")
    (added,) = secured.nodes().keys() - before.keys()
    tell("unregister", added, "fedsim")
    own = ["--auth-supernode-private-key", str(tmp_path / "guest.key")]
    done = start_node(secured, tmp_path, *trusting(*own, authority=ours(secured)))
    assert done.returncode != 0
    assert "could not establish a connection" in done.stdout + done.stderr, done
    assert secured.nodes() == before | {added: "unregistered"}


# ------------------------------------------------------------------------------------------ certificates


def test_who_trusts_the_authority_is_let_in(secured: Secured) -> None:
    assert ask(secured, ours(secured), "localhost") == 200
    assert ask(secured, ours(secured), "127.0.0.1") == 200


@pytest.mark.parametrize(
    ("whose", "name", "reason"),
    [
        ("stranger", "localhost", "certificate verify failed"),
        ("ours", "elsewhere.example", "Hostname mismatch"),
        ("ours", "10.1.2.3", "IP address mismatch"),
    ],
)
def test_a_client_with_a_wrong_certificate_does_not_connect(
    whose: str, name: str, reason: str, secured: Secured, stranger: Path
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=reason):
        ask(secured, stranger if whose == "stranger" else ours(secured), name)


def test_a_node_with_another_authority_does_not_connect(
    secured: Secured, stranger: Path, tmp_path: Path
) -> None:
    # Its key is a registered one: only what it trusts is wrong.
    own = ["--auth-supernode-private-key", str(ours(secured) / "node-0.key")]
    done = start_node(secured, tmp_path, *trusting(*own, authority=stranger))
    assert done.returncode != 0
    assert "CERTIFICATE_VERIFY_FAILED" in done.stdout + done.stderr, done


@pytest.mark.parametrize("wrong", ["authority", "plaintext"])
def test_a_command_with_a_wrong_connection_is_refused(
    wrong: str, secured: Secured, stranger: Path, tmp_path: Path
) -> None:
    authority = stranger / "ca.crt" if wrong == "authority" else None
    environment = os.environ | write_connection(tmp_path / "home", "wrong", address(secured), authority)
    command = [find_command("flwr"), "supernode", "list", "wrong"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    for node in deployment._read(secured.folder).nodes:
        assert node.id not in done.stdout


# --------------------------------------------------------------------------------------------- plaintext


def test_a_plaintext_request_gets_no_answer(secured: Secured) -> None:
    connection = http.client.HTTPConnection(address(secured), timeout=10)
    connection.request("GET", "/health")
    with pytest.raises((http.client.HTTPException, OSError)):
        connection.getresponse()
    connection.close()


def test_a_plaintext_node_does_not_connect(secured: Secured, tmp_path: Path) -> None:
    done = start_node(secured, tmp_path, "--insecure")
    assert done.returncode != 0
    assert "SuperNode ID" not in done.stdout + done.stderr, done


# ------------------------------------------------------------------------------------------- this machine


@pytest.mark.parametrize("part", ["node-0", "link"])
def test_nobody_without_the_secret_takes_the_work_of_a_superexec(part: str, secured: Secured) -> None:
    command = secured.processes(part)[0].cmdline()
    port = int(command[command.index("--port") + 1])
    context = ssl.create_default_context(cafile=str(ours(secured) / "ca.crt"))
    connection = (
        http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
        if part == "link"
        else http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    )
    connection.request("POST", "/v1/runtime/acquire-task", b"", {"Content-Type": "application/protobuf"})
    assert connection.getresponse().status == http.HTTPStatus.UNAUTHORIZED
    connection.close()
