"""known_hosts files, against what OpenSSH's own ssh-keygen finds in them."""

import logging
import shutil
import subprocess
from pathlib import Path

import pytest

from dagster_sbatch.auth.keys import fingerprint
from dagster_sbatch.ssh.host_key import CERT_AUTHORITY, REVOKED, KnownHosts, names_of, warn_once

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGGmRHV2v1x5rpIjXHqDvnVBGWgXqwWRV6tAAjuULVsD"
OTHER = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB5YptTHqfRr2Xw7sL0iQ8g7gS9nN1kHk1uJ5qMXH7rH"

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "known_hosts"


@pytest.fixture(autouse=True)
def nothing_reported_yet() -> None:
    warn_once.cache_clear()


def found_by_us(file: Path, name: str) -> set[int]:
    """The numbers of the lines for a name, whatever they say of it."""
    known = KnownHosts.read([file])
    entries = [entry for marker in ("", CERT_AUTHORITY, REVOKED) for entry in known.matching([name], marker)]
    return {int(entry.place.rsplit(":", 1)[1]) for entry in entries}


def found_by_openssh(file: Path, name: str) -> set[int]:
    done = subprocess.run(["ssh-keygen", "-F", name, "-f", file], capture_output=True, text=True, check=False)
    return {int(line.split("line ")[1].split()[0]) for line in done.stdout.splitlines() if line.startswith("# Host")}


LINES = f"""\
# a comment
plain.example {KEY}
plain.example {OTHER}
a.example,b.example {KEY} with a comment
*.asc.ac.at {KEY}
*.asc.ac.at,!bad.asc.ac.at {KEY}
!bad.asc.ac.at,*.asc.ac.at {KEY}
!only.negated {KEY}
login0?.example {KEY}
UPPER.example {KEY}
[plain.example]:2222 {KEY}
[*.asc.ac.at]:2222 {KEY}
*:2222 {KEY}
* {KEY}
10.77.0.* {KEY}
fe80::1,[::1]:2222 {KEY}
dots.example.* {KEY}
ab[cd].example {KEY}
@cert-authority *.asc.ac.at {KEY}
@revoked plain.example {KEY}
  \t indented.example\t{KEY}
no-key.example ssh-ed25519
wrong-base64.example ssh-ed25519 AAAA!
wrong-type.example ssh-rsa {KEY.split()[1]}
cut-short.example {KEY[:-8]}
@unknown marked.example {KEY}
"""


@pytest.mark.parametrize(
    "name",
    """plain.example a.example b.example musica.vie.asc.ac.at bad.asc.ac.at only.negated other.negated login01.example
    login001.example upper.example [plain.example]:2222 [musica.vie.asc.ac.at]:2222 [musica.vie.asc.ac.at]:2223
    10.77.0.9 10.77.10.9 fe80::1 [::1]:2222 ::1 dotsXexample.org dots.example.org abc.example
    ab[cd].example indented.example no-key.example marked.example asc.ac.at""".split(),
)
def test_lines_for_a_name_are_those_that_openssh_finds(file: Path, name: str) -> None:
    file.write_text(LINES)
    assert found_by_us(file, name) == found_by_openssh(file, name)


def test_openssh_finds_something_at_all(file: Path) -> None:
    """So that the test above compares more than empty sets."""
    file.write_text(LINES)
    assert found_by_openssh(file, "musica.vie.asc.ac.at") == {5, 6, 7, 14, 19}


@pytest.mark.parametrize("name", ["plain.example", "[plain.example]:2222", "10.77.0.9", "other.example"])
def test_hashed_names(file: Path, name: str) -> None:
    file.write_text(f"plain.example,10.77.0.9 {KEY}\n[plain.example]:2222 {OTHER}\n")
    subprocess.run(["ssh-keygen", "-H", "-f", file], capture_output=True, check=True)
    text = file.read_text()
    assert text.count("|1|") == 3
    assert "example" not in text
    assert found_by_us(file, name) == found_by_openssh(file, name)


@pytest.mark.parametrize("hosts", ["|1|AAAA", "|2|AAAA|AAAA", "|1|?|?", "|1|AAAA|AAAA|AAAA", "|1|AAAA|AAAA"])
def test_damaged_hashes_match_nothing(file: Path, hosts: str) -> None:
    file.write_text(f"{hosts} {KEY}\n")
    assert found_by_us(file, "plain.example") == set()


def test_names_with_another_port() -> None:
    assert names_of("Musica.Example", 22) == ["musica.example"]
    assert names_of("Musica.Example", 2222) == ["[musica.example]:2222", "musica.example"]


def test_fingerprint_is_the_one_of_ssh_keygen(file: Path) -> None:
    file.write_text(f"plain.example {KEY}\n")
    shown = subprocess.run(["ssh-keygen", "-lf", file], capture_output=True, text=True, check=True).stdout
    assert shown.split()[1] == fingerprint(KnownHosts.read([file]).entries[0].key)


def test_broken_lines_are_reported_once_and_the_others_are_used(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(LINES)
    for _ in range(2):
        assert len(KnownHosts.read([file]).matching(["a.example"], "")) == 2
    broken = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [message.split(" is not")[0] for message in broken] == [f"{file}:{number}" for number in range(22, 27)]
    assert "base64" in broken[1]
    assert "not of the type ssh-rsa" in broken[2]
    assert "cut short" in broken[3]
    assert "@unknown" in broken[4]


def test_missing_and_unreadable_files(tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file.write_bytes(b"caf\xe9.example broken\n" + f"plain.example {KEY}\r\n".encode())
    known = KnownHosts.read([tmp_path / "missing", folder, file])
    assert len(known.matching(["plain.example"], "")) == 1
    assert caplog.messages[0] == f"{folder} cannot be read and is skipped: Is a directory"
    assert len(caplog.messages) == 2
