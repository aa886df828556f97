"""Certificates and keys: who may read them, what they hold for, who accepts them."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification

from fedsim import keys
from fedsim.errors import BadInput


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    assert keys.make_authority(folder)
    keys.make_certificate(folder, ["link.example.org", "10.0.0.5"], days=30)
    assert keys.make_node_key(folder, "clinic-a")
    keys.make_secret(folder)
    return folder


def certificate(folder: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / name).read_bytes())


def verify(folder: Path, authority: Path, host: str, when: datetime.datetime | None = None) -> None:
    """Check the chain by the rules of browsers."""
    store = verification.Store([certificate(authority, "ca.crt")])
    builder = verification.PolicyBuilder().store(store)
    verifier = (builder.time(when) if when else builder).build_server_verifier(x509.DNSName(host))
    verifier.verify(certificate(folder, "link.crt"), [])


def test_only_the_owner_reads_what_is_secret(folder: Path) -> None:
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    public = {"ca.crt", "link.crt", "clinic-a.pub"}
    assert modes == {
        name: 0o644 if name in public else 0o600
        for name in ("ca.crt", "ca.key", "link.crt", "link.key", "clinic-a.key", "clinic-a.pub", "superexec")
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_secrets_are_not_readable_for_a_moment_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    replace = Path.replace
    monkeypatch.setattr(
        Path,
        "replace",
        lambda self, to: (opened.append(stat.S_IMODE(self.stat().st_mode)), replace(self, to))[1],
    )
    keys.write_private(tmp_path / "secret", b"x")
    assert opened == [0o600]


def test_the_certificate_holds_for_its_hosts_and_this_machine(folder: Path) -> None:
    assert keys.certificate_hosts(folder) == ["localhost", "link.example.org", "127.0.0.1", "::1", "10.0.0.5"]
    verify(folder, folder, "link.example.org")
    verify(folder, folder, "localhost")
    with pytest.raises(verification.VerificationError):
        verify(folder, folder, "elsewhere.example.org")


def test_another_authority_does_not_vouch_for_it(folder: Path, tmp_path: Path) -> None:
    keys.make_authority(tmp_path / "other")
    with pytest.raises(verification.VerificationError):
        verify(folder, tmp_path / "other", "link.example.org")


def test_it_ends_and_is_renewed_under_the_same_authority(folder: Path) -> None:
    assert 29.9 < keys.certificate_days_left(folder) <= 30
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=31)
    with pytest.raises(verification.VerificationError):
        verify(folder, folder, "localhost", later)
    before = certificate(folder, "link.crt")
    assert not keys.make_authority(folder)
    keys.make_certificate(folder, ["link.example.org"], days=60)
    after = certificate(folder, "link.crt")
    assert after.serial_number != before.serial_number
    assert after.public_key() != before.public_key()
    verify(folder, folder, "link.example.org", later)


def test_certificate_and_key_belong_together(folder: Path) -> None:
    for name in ("ca", "link"):
        key = serialization.load_pem_private_key((folder / f"{name}.key").read_bytes(), None)
        assert certificate(folder, f"{name}.crt").public_key() == key.public_key()


def test_a_node_has_a_pair_that_flower_reads(folder: Path) -> None:
    private = serialization.load_ssh_private_key((folder / "clinic-a.key").read_bytes(), None)
    public = serialization.load_ssh_public_key((folder / "clinic-a.pub").read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert isinstance(public.curve, ec.SECP384R1)
    assert private.public_key() == public


def test_what_is_there_is_kept(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert not keys.make_authority(folder)
    assert not keys.make_node_key(folder, "clinic-a")
    keys.make_secret(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_lost_public_key_is_written_again(folder: Path) -> None:
    before = (folder / "clinic-a.pub").read_bytes()
    (folder / "clinic-a.pub").unlink()
    assert keys.make_node_key(folder, "clinic-a")
    assert (folder / "clinic-a.pub").read_bytes() == before


def test_half_an_authority_is_not_replaced(folder: Path) -> None:
    (folder / "ca.key").unlink()
    with pytest.raises(BadInput, match=r"ca\.key: is missing beside its other half"):
        keys.make_authority(folder)


@pytest.mark.parametrize(
    "host", ["", "a b", "-a.org", "a..org", "http://a.org", "a" * 64 + ".org", "a.org:8000"]
)
def test_a_host_is_a_name_or_an_address(host: str, folder: Path) -> None:
    with pytest.raises(BadInput, match=r"must be a name such as link\.example\.org or an address"):
        keys.make_certificate(folder, [host])


@pytest.mark.parametrize("name", ["", "../x", "a/b", "ca", "link", ".hidden"])
def test_a_node_has_a_plain_name(name: str, folder: Path) -> None:
    with pytest.raises(BadInput, match="must be a name of letters, digits"):
        keys.make_node_key(folder, name)


@pytest.mark.parametrize("days", [0, -1, 3651])
def test_days_have_a_range(days: int, folder: Path) -> None:
    with pytest.raises(BadInput, match=f"--days = {days} must be from 1 to 3650"):
        keys.make_certificate(folder, [], days)
