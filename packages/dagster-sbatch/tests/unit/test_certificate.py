"""The certificate beside the key: what counts as one, how long it lives; nothing of the user's is overwritten."""

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    SSHCertificateBuilder,
    SSHCertificateType,
)

from dagster_sbatch.auth import (
    AccessError,
    UnsafeFileError,
    ensure_certificate,
    replace_refused_certificate,
)
from dagster_sbatch.auth.keys import (
    CertificateError,
    KeyFileError,
    certificate_path,
    ensure_key,
    public_path,
    read_certificate,
    write_certificate,
)
from support import access

HOUR = 3600
AUTHORITY = Ed25519PrivateKey.generate()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return tmp_path / "ssh" / "id_musica"


def write_key(key: Path, encryption: KeySerializationEncryption | None = None) -> Ed25519PrivateKey:
    private = Ed25519PrivateKey.generate()
    key.parent.mkdir(exist_ok=True)
    key.touch(mode=0o600)
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, encryption or NoEncryption()))
    public = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    public_path(key).write_bytes(public + b" of me\n")
    return private


def certify(
    private: Ed25519PrivateKey,
    begin: float = -60,
    end: float = 16 * HOUR,
    kind: SSHCertificateType = SSHCertificateType.USER,
) -> str:
    """A certificate; times are seconds from now."""
    now = time.time()
    builder = SSHCertificateBuilder().public_key(private.public_key()).type(kind).serial(1).key_id(b"x")
    builder = builder.valid_principals([b"xy12345", b"xy12345@sim.test"])
    builder = builder.valid_after(int(now + begin)).valid_before(int(now + end))
    return builder.sign(AUTHORITY).public_bytes().decode()


def test_its_validity_is_read_in_utc_in_every_time_zone(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = write_key(key)
    monkeypatch.setenv("TZ", "Europe/Vienna")
    time.tzset()
    try:
        certificate_path(key).write_text(certify(private, begin=-60, end=1800))
        found, now = read_certificate(key), datetime.now(UTC)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert (found.valid_before - now).total_seconds() == pytest.approx(1800, abs=5)
    assert not found.validity_problem(now)
    assert found.validity_problem(now + timedelta(seconds=1801))  # in Vienna a reader of local times believes otherwise
    assert found.principals == ("xy12345", "xy12345@sim.test")


@pytest.mark.parametrize(
    ("begin", "end", "obtained", "skew", "due"),
    [
        (0, 900, 0, None, 600),
        (-60, 900, 0, None, 600),  # step-ca dates the begin back
        (-60, 20, 0, None, 40 / 3),
        (0, 900, 0, 5, 600),
        (0, 900, 0, 60, 450),  # not always due
        (0, 900, 300, None, 700),  # copied here later
        (0, 900, -10_000, None, 600),  # a file that is older than its content
        (0, 900, 10_000, None, 900),
    ],
)
def test_when_it_is_due(key: Path, begin: int, end: int, obtained: float, skew: float | None, due: float) -> None:
    private, now = write_key(key), int(time.time())
    certificate_path(key).write_text(certify(private, begin, end))
    os.utime(certificate_path(key), (now + obtained, now + obtained))
    found = read_certificate(key)
    assert found.renew_at(skew).timestamp() == pytest.approx(now + due, abs=1.5)


def test_one_of_another_key_counts_as_none(key: Path) -> None:
    write_key(key)
    certificate_path(key).write_text(certify(Ed25519PrivateKey.generate()))
    with pytest.raises(CertificateError, match=r"id_musica-cert\.pub is not a certificate of the key .*id_musica"):
        read_certificate(key)


def test_a_host_certificate_a_plain_key_and_rubbish_count_as_none(key: Path) -> None:
    private = write_key(key)
    plain = public_path(key).read_text()
    for text in (certify(private, kind=SSHCertificateType.HOST), plain, "ssh-ed25519-cert-v01@openssh.com AAAA", ""):
        certificate_path(key).write_text(text)
        with pytest.raises(CertificateError, match=r"does not hold an SSH (user )?certificate"):
            read_certificate(key)


def test_without_its_key_or_with_a_key_that_others_can_read_it_counts_as_none(key: Path) -> None:
    private = write_key(key)
    with pytest.raises(CertificateError, match=r"id_musica-cert\.pub: no such file"):
        read_certificate(key)
    certificate_path(key).write_text(certify(private))
    key.chmod(0o640)
    with pytest.raises(KeyFileError, match=r"Others can read the private key .*\n  chmod 600"):
        read_certificate(key)
    key.unlink()
    with pytest.raises(CertificateError, match="does not exist"):
        read_certificate(key)


def test_a_certificate_without_end_is_read(key: Path) -> None:
    private = write_key(key)
    builder = SSHCertificateBuilder().public_key(private.public_key()).type(SSHCertificateType.USER)
    text = builder.valid_after(0).valid_before(2**64 - 1).valid_principals([b"xy12345"]).sign(AUTHORITY).public_bytes()
    certificate_path(key).write_bytes(text)
    assert read_certificate(key).valid_before.year == 9999


def test_a_key_is_made_where_there_is_none_and_never_again(key: Path) -> None:
    line = ensure_key(key)
    assert line.startswith("ssh-ed25519 ")
    assert key.stat().st_mode & 0o777 == 0o600
    assert public_path(key).read_text() == line + "\n"
    before = key.read_bytes()
    assert line.startswith(ensure_key(key))  # without the comment
    assert key.read_bytes() == before


def test_a_key_of_the_users_is_used_as_it_is(key: Path) -> None:
    write_key(key)
    before, public = key.read_bytes(), public_path(key).read_text()
    assert public.startswith(ensure_key(key))
    public_path(key).write_text("of another key")
    assert public.startswith(ensure_key(key))  # derived from the private half
    assert (key.read_bytes(), public_path(key).read_text()) == (before, "of another key")


def test_a_key_with_a_passphrase_is_refused(key: Path) -> None:
    write_key(key, BestAvailableEncryption(b"test-passphrase"))
    with pytest.raises(KeyFileError, match=r"has a passphrase, and nobody is there to type it.*\n  ssh-keygen -p"):
        ensure_key(key)


def test_a_public_half_without_its_key_is_left_alone(key: Path) -> None:
    write_key(key)
    public = public_path(key).read_text()
    key.unlink()
    with pytest.raises(AccessError, match="has no private key"):
        ensure_key(key)
    assert public_path(key).read_text() == public
    assert not key.exists()


def test_a_key_that_others_can_read_is_refused(key: Path) -> None:
    write_key(key)
    key.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        ensure_key(key)


def test_a_link_to_nowhere_is_not_taken_for_no_key(key: Path) -> None:
    key.parent.mkdir()
    key.symlink_to("gone")
    with pytest.raises(UnsafeFileError, match="is a symbolic link to nowhere"):
        ensure_key(key)
    assert key.is_symlink()


def test_only_the_certificate_is_replaced_and_only_by_one_of_the_key(key: Path) -> None:
    private = write_key(key)
    good = certify(private)
    assert not write_certificate(key, good).validity_problem(datetime.now(UTC))
    key_before = key.read_bytes()
    with pytest.raises(CertificateError, match="another key than the one sent"):
        write_certificate(key, certify(Ed25519PrivateKey.generate()))
    with pytest.raises(CertificateError, match="does not hold"):
        write_certificate(key, "rubbish")
    assert certificate_path(key).read_text().strip() == good
    assert key.read_bytes() == key_before
    assert sorted(path.name for path in key.parent.iterdir()) == ["id_musica", "id_musica-cert.pub", "id_musica.pub"]


def test_after_a_refusal_a_certificate_that_another_process_has_written_meanwhile_is_used(tmp_path: Path) -> None:
    """It is young; a young one that was refused itself is not replaced."""
    settings = access.settings_of(access.environment("https://127.0.0.1:1", tmp_path))
    assert settings.edge_node_key_path
    access.certify(settings.edge_node_key_path, access.DAY)
    refused = ensure_certificate(settings)
    access.certify(settings.edge_node_key_path, 2 * access.DAY)
    assert replace_refused_certificate(settings, refused)
    assert not replace_refused_certificate(settings, ensure_certificate(settings))
