"""Private keys and certificates of users, made by ssh-keygen."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dagster_sbatch.ssh import AuthenticationError
from dagster_sbatch.ssh.client_config import Hop
from dagster_sbatch.ssh.user_key import UserKey

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")


def keygen(*arguments: str | Path) -> None:
    subprocess.run(["ssh-keygen", "-q", *arguments], check=True)


def make(path: Path, *options: str, passphrase: str = "") -> Path:
    keygen("-N", passphrase, "-C", "", "-f", path, *(options or ("-t", "ed25519")))
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make(tmp_path / "id_test")


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return make(tmp_path / "authority")


@pytest.mark.parametrize("options", ["-t ed25519", "-t ecdsa", "-t rsa", "-t rsa -m PEM", "-t ecdsa -b 521 -m PKCS8"])
def test_keys_of_every_kind_with_their_certificate(tmp_path: Path, authority: Path, options: str) -> None:
    path = make(tmp_path / "id", *options.split())
    assert UserKey.load(path).certificate is None
    keygen("-s", authority, "-I", "test", "-n", "xy12345,jane", f"{path}.pub")
    loaded = UserKey.load(path)
    assert loaded.certificate is not None
    assert loaded.certificate.principals == ("xy12345", "jane")
    assert loaded.private.public_blob.key_type.endswith("-cert-v01@openssh.com")


def test_a_certificate_with_a_comment_in_another_encoding(key: Path, authority: Path) -> None:
    keygen("-s", authority, "-I", "test", "-n", "xy12345", f"{key}.pub")
    beside = key.with_name("id_test-cert.pub")
    beside.write_bytes(beside.read_bytes().rstrip() + " Jürgen\n".encode("latin-1"))
    assert UserKey.load(key).private.public_blob


def test_a_key_without_a_comment_that_needs_no_padding(tmp_path: Path) -> None:
    """Half of all ECDSA keys: paramiko's own reader takes their last zero for a padding of no length."""
    for number in range(10):
        assert UserKey.load(make(tmp_path / str(number), "-t", "ecdsa")).private.get_name() == "ecdsa-sha2-nistp256"


@pytest.mark.parametrize("options", ["-t ed25519", "-t rsa -m PEM", "-t ecdsa -m PKCS8"])
def test_a_passphrase_is_told(tmp_path: Path, options: str) -> None:
    path = make(tmp_path / "id", *options.split(), passphrase="not-to-be-told")
    with pytest.raises(AuthenticationError, match="has a passphrase, and nobody is there to type it") as refused:
        UserKey.load(path)
    assert "not-to-be-told" not in str(refused.value)


def test_a_missing_key_is_told(tmp_path: Path) -> None:
    with pytest.raises(AuthenticationError, match=r"id \(SLURM_.*\) does not exist.*\n.*refresh_step_auth"):
        UserKey.load(tmp_path / "id")


def test_a_key_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(AuthenticationError, match="cannot be read: Is a directory"):
        UserKey.load(tmp_path)


@pytest.mark.parametrize("content", ["", "nonsense\n", "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n"])
def test_what_is_no_key_is_told_without_its_content(tmp_path: Path, content: str) -> None:
    path = tmp_path / "id"
    path.write_text(content)
    with pytest.raises(AuthenticationError, match="is not a private SSH key") as refused:
        UserKey.load(path)
    assert "nonsense" not in str(refused.value)


def test_a_public_key_in_place_of_the_private_one_is_told(key: Path) -> None:
    with pytest.raises(AuthenticationError, match="is not a private SSH key"):
        UserKey.load(Path(f"{key}.pub"))


def test_a_damaged_certificate_is_told(key: Path) -> None:
    Path(f"{key}-cert.pub").write_text("ssh-ed25519-cert-v01@openssh.com AAAA")
    with pytest.raises(AuthenticationError, match=r"id_test-cert.pub does not hold an SSH certificate"):
        UserKey.load(key)


def test_a_public_key_in_place_of_the_certificate_is_told(key: Path) -> None:
    shutil.copy(f"{key}.pub", f"{key}-cert.pub")
    with pytest.raises(AuthenticationError, match="does not hold an SSH user certificate"):
        UserKey.load(key)


def test_the_certificate_of_another_key_is_told(tmp_path: Path, key: Path, authority: Path) -> None:
    other = make(tmp_path / "other")
    keygen("-s", authority, "-I", "test", "-n", "xy12345", f"{other}.pub")
    shutil.copy(f"{other}-cert.pub", f"{key}-cert.pub")
    with pytest.raises(AuthenticationError, match="is not a certificate of the key"):
        UserKey.load(key)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            "-n xy12345 -V 20200102030405Z:20200102040405Z",
            "expired at 2020-01-02 04:04:05 UTC. Get a new",
        ),
        ("-n xy12345 -V +1h:+2h", "is not valid before 20.*this machine's clock shows 20.* Check that clock"),
        ("-n jane -V -1h:+1h", "is not for 'xy12345'. Set SLURM_EDGE_NODE_USER to a name in the certificate"),
        ("-V -1h:+1h", "is not for 'xy12345'"),
        ("-n jane,xy12345 -V -1h:+1h", "does not trust its authority, or has closed the account.*\n  ssh -v -i "),
    ],
)
def test_what_a_refusal_says(key: Path, authority: Path, options: str, advice: str) -> None:
    keygen("-s", authority, "-I", "test", *options.split(), f"{key}.pub")
    hop = Hop("musica.example", 22, "xy12345", key, ())
    text = str(UserKey.load(key).refused(hop, ["publickey", "hostbased"], partial=False))
    assert text.startswith("musica.example (port 22) has refused to log in 'xy12345'. It was shown\n")
    assert f"  the key {key} (ssh-ed25519 SHA256:" in text
    assert "It accepts: publickey, hostbased\n" in text
    assert re.search(advice, text), text
    if "20200102" in options:
        assert "for xy12345; valid from 2020-01-02 03:04:05 UTC to 2020-01-02 04:04:05 UTC; signed by" in text


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused(key: Path, mode: int) -> None:
    """With or without a certificate beside it."""
    key.chmod(mode)
    with pytest.raises(AuthenticationError, match=rf"Others can read the private key {key}.*\n  chmod 600 {key}"):
        UserKey.load(key)
