"""Certificates of a federation, and keys by which its SuperNodes are known.

A folder of keys holds ``ca.crt`` and ``ca.key`` (the authority, which signs and does nothing else), ``link.crt`` and
``link.key`` (the SuperLink's), ``superexec`` (a secret that only processes of one machine share), and for each SuperNode
a pair ``NAME.key`` and ``NAME.pub`` as ``ssh-keygen`` writes them. Nodes need ``ca.crt`` and their own pair; the link
needs its own two files, ``ca.crt`` and the nodes' ``.pub``.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsim.errors import BadInput

AUTHORITY_DAYS = 3650
DAYS = 365
LOCAL = ("localhost", "127.0.0.1", "::1")
SKEW = timedelta(hours=1)
"""How far behind the clocks of nodes may be when they see a new certificate."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LABEL = re.compile(r"(\*|[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)")


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner may enter, or see that there is one.

    Parameters
    ----------
    folder : Path
        The folder; those above it are made too.

    Raises
    ------
    BadInput
        If it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be made: {error.strerror}") from None


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all.

    Parameters
    ----------
    path : Path
        The file, replaced if it is there.
    content : bytes
        What it shall hold.
    """
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def make_authority(folder: Path) -> bool:
    """Make the authority of a federation, unless the folder has one.

    Parameters
    ----------
    folder : Path
        Folder of keys.

    Returns
    -------
    bool
        Whether it is new.

    Raises
    ------
    BadInput
        If only one of its two files is there.
    """
    have = [(folder / name).exists() for name in ("ca.crt", "ca.key")]
    if all(have):
        return False
    if any(have):
        missing = folder / ("ca.key" if have[0] else "ca.crt")
        raise BadInput(f"{missing}: is missing beside its other half; put it back, or take a new folder")
    make_folder(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fedsim federation")
    certificate = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    write_private(folder / "ca.key", _private(key))
    _write_public(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))
    return True


def make_certificate(folder: Path, hosts: list[str], days: int = DAYS) -> None:
    """Make a new key and certificate for the SuperLink, signed by the folder's authority.

    Parameters
    ----------
    folder : Path
        Folder of keys with an authority.
    hosts : list of str
        Names and addresses by which the link is reached, besides those of this machine for itself.
    days : int
        For how long it is valid, >= 1.

    Raises
    ------
    BadInput
        If a host is neither a name nor an address, or ``days`` is out of range.
    """
    if not 1 <= days <= AUTHORITY_DAYS:
        raise BadInput(f"--days = {days} must be from 1 to {AUTHORITY_DAYS}")
    alternatives = [_alternative(host) for host in dict.fromkeys([*LOCAL, *hosts])]
    authority_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    known = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_name((hosts or ["localhost"])[0][:64]), authority.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(known), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    write_private(folder / "link.key", _private(key))
    _write_public(folder / "link.crt", certificate.public_bytes(serialization.Encoding.PEM))


def certificate_hosts(folder: Path) -> list[str]:
    """List the names and addresses for which the SuperLink's certificate holds.

    Parameters
    ----------
    folder : Path
        Folder of keys.

    Returns
    -------
    list of str
        Names first; nothing if there is no certificate.
    """
    if not (folder / "link.crt").exists():
        return []
    certificate = x509.load_pem_x509_certificate((folder / "link.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return [*names.get_values_for_type(x509.DNSName), *addresses]


def certificate_days_left(folder: Path) -> float:
    """Say for how many more days the SuperLink's certificate is valid."""
    certificate = x509.load_pem_x509_certificate((folder / "link.crt").read_bytes())
    return (certificate.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)


def make_node_key(folder: Path, name: str) -> bool:
    """Make the pair of keys of one SuperNode on the curve P-384, unless the folder has it.

    Parameters
    ----------
    folder : Path
        Folder of keys.
    name : str
        Name of the node, of letters, digits, ``.``, ``_`` and ``-``.

    Returns
    -------
    bool
        Whether it is new.

    Raises
    ------
    BadInput
        If the name is of other characters or is that of another file.
    """
    if not _NAME.fullmatch(name) or name in ("ca", "link"):
        raise BadInput(
            f"--node = {name!r} must be a name of letters, digits, '.', '_' and '-', not 'ca' or 'link'"
        )
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    if private.exists() and public.exists():
        return False
    make_folder(folder)
    if private.exists():
        key = serialization.load_ssh_private_key(private.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        openssh = serialization.PrivateFormat.OpenSSH
        write_private(
            private,
            key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption()),
        )
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write_public(public, line + f" {name}\n".encode())
    return True


def make_secret(folder: Path) -> None:
    """Make the secret that a SuperLink or SuperNode shares with the SuperExec that runs its apps, unless there is one.

    Parameters
    ----------
    folder : Path
        Folder of keys; the file is ``superexec``.
    """
    if not (folder / "superexec").exists():
        make_folder(folder)
        write_private(folder / "superexec", secrets.token_bytes(32))


def _write_public(path: Path, content: bytes) -> None:
    write_private(path, content)
    path.chmod(0o644)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    pkcs8, open_ = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, pkcs8, open_)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509
        .CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) and len(label) <= 63 for label in labels):
        raise BadInput(
            f"--host = {host!r} must be a name such as link.example.org or an address such as 10.0.0.5"
        )
    return x509.DNSName(host)
