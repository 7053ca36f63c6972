"""The way to the login node: settings and ~/.ssh/config, against what OpenSSH's own ssh makes of the same file."""

import getpass
import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.settings import Settings
from dagster_sbatch.ssh.client_config import SYSTEM_KNOWN_HOSTS, Hop, read_route
from dagster_sbatch.ssh.host_key import warn_once


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file ~/.ssh/config of a home that is empty otherwise; it does not exist yet."""
    warn_once.cache_clear()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    return tmp_path / ".ssh" / "config"


def settings(**values: Any) -> Settings:
    """Settings with a host and a key, and the values given (None: unset)."""
    all_values: dict[str, Any] = {"HOST": "musica", "KEY_PATH": "~/.ssh/id_musica"} | values
    return Settings(**{f"SLURM_EDGE_NODE_{name}": value for name, value in all_values.items()})


def test_without_a_config_the_settings_are_all() -> None:
    login, jump = read_route(settings(HOST="musica.vie.asc.ac.at", USER="xy12345"))
    ssh = Path("~/.ssh").expanduser()
    known_hosts = (ssh / "known_hosts", ssh / "known_hosts2", SYSTEM_KNOWN_HOSTS)
    assert login == Hop("musica.vie.asc.ac.at", 22, "xy12345", ssh / "id_musica", known_hosts)
    assert jump is None


CONFIG = """\
# like the file of a real user
User = everybody
Host musica # the supercomputer
    HostName musica.vie.asc.ac.at # its first login node
    Port 2222	# not 22
    IdentityFile "~/.ssh/id_%r #1" # of the centre
    IdentityFile ~/.ssh/second
Host mus* !musica
    HostName other.example
Host quoted
    HostName="quoted.example"
    UserKnownHostsFile ~/kh1 "/tmp/k h2"
Host quotes
    UserKnownHostsFile "/tmp/k h" # of the centre
Host several
    userknownhostsfile="/tmp/k h" /tmp/kh '/tmp/k h2'
Host through
    ProxyJump jane@gate.example:2200 # with a card
Host url
    ProxyJump ssh://jane@gate.example:2200/
Host none
    ProxyJump None
Host * !quoted
    HostName %h.asc.ac.at
    Port 1
    UserKnownHostsFile /dev/null
"""


@pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not installed")
@pytest.mark.parametrize(
    "host", ["musica", "music", "quoted", "quotes", "several", "through", "url", "none", "unheard-of"]
)
def test_the_config_is_read_as_openssh_reads_it(config: Path, host: str) -> None:
    config.write_text(CONFIG)
    done = subprocess.run(["ssh", "-G", "-F", config, host], capture_output=True, text=True, check=True)
    theirs: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        theirs.setdefault(name, []).append(value)
    login, jump = read_route(settings(HOST=host, KEY_PATH=None if host == "musica" else "/key"))
    assert [login.host] == theirs["hostname"]
    assert [str(login.port)] == theirs["port"]
    assert [login.user] == theirs["user"]
    home = pwd.getpwuid(os.getuid()).pw_dir  # which ssh takes for `~`, whatever HOME says
    files = " ".join(str(file) for file in login.known_hosts[:-1])
    assert [files.replace(str(Path.home()), home)] == theirs["userknownhostsfile"]
    if host == "musica":
        assert str(login.key) == theirs["identityfile"][0].replace("~", str(Path.home())).replace("%r", "everybody")
    assert ("proxyjump" in theirs) is (jump is not None)
    if jump:
        assert theirs["proxyjump"] == [f"{jump.user}@gate.example:{jump.port}"]


@pytest.mark.parametrize(
    ("value", "files"),
    [('"/k h"', ["/k h"]), ('"/k h" "/kh 2"', ["/k h", "/kh 2"]), ("/kh none", ["/kh"]), ("/a-file", ["/a-file"])],
)
def test_the_files_of_known_hosts(config: Path, value: str, files: list[str]) -> None:
    """`ssh -G` prints them without quotation marks."""
    config.write_text(f"UserKnownHostsFile = {value} # those of the centre\n")
    assert read_route(settings())[0].known_hosts == (*map(Path, files), SYSTEM_KNOWN_HOSTS)


def test_the_settings_win(config: Path) -> None:
    config.write_text("Host musica\nUser other\nPort 2222\nIdentityFile ~/.ssh/other\n")
    login, _ = read_route(settings(USER="xy12345", PORT="22"))
    assert (login.user, login.port, login.key.name) == ("xy12345", 22, "id_musica")


def test_the_config_fills_in_what_the_settings_leave_out(config: Path) -> None:
    config.write_text("Host musica\nUser other\nPort 2222\nIdentityFile ~/.ssh/other\nIdentityFile ~/.ssh/there\n")
    (config.parent / "there").touch()
    login, _ = read_route(settings(KEY_PATH=None))
    assert (login.user, login.port, login.key.name) == ("other", 2222, "there")


def test_no_user_anywhere_is_oneself() -> None:
    assert read_route(settings())[0].user == getpass.getuser()


def test_a_user_without_a_name_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is started with a uid of its own."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(ConfigurationError, match=r"uid 54321.*\n  export USER=dagster$"):
        read_route(settings(USER="xy12345"))
    monkeypatch.setenv("USER", "dagster")
    assert read_route(settings(USER="xy12345"))[0].user == "xy12345"


def test_the_jump_host_has_options_of_its_own(config: Path) -> None:
    config.write_text(
        "Host musica\nProxyJump gate\nUserKnownHostsFile none\n"
        "Host gate\nHostName gate.example\nPort 2200\nUser jane\nIdentityFile /keys/gate\nUserKnownHostsFile /kh\n"
    )
    login, jump = read_route(settings(USER="xy12345"))
    assert jump == Hop("gate.example", 2200, "jane", Path("/keys/gate"), (Path("/kh"), SYSTEM_KNOWN_HOSTS))
    assert login.known_hosts == (SYSTEM_KNOWN_HOSTS,)


def test_a_jump_host_without_options_is_logged_in_to_like_the_login_node(config: Path) -> None:
    config.write_text("Host *\nProxyJump gate.example\nIdentityFile None\n")
    login, jump = read_route(settings(USER="xy12345"))
    assert jump == Hop("gate.example", 22, "xy12345", login.key, login.known_hosts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ProxyJump first,second", "ProxyJump first,second is not one host"),
        ("Host musica\nProxyJump gate\nHost gate\nProxyJump outer", "gate is itself behind outer"),
        ("Port 99999", "Port 99999 for musica is not a port"),
        ("Port ssh", "Port ssh for musica is not a port"),
        ("Host 'musica", "Unparsable host"),
        ('UserKnownHostsFile "/kh 1', 'UserKnownHostsFile "/kh 1 for musica lacks a quotation mark'),
        ("UserKnownHostsFile ~no-such-user/kh", "UserKnownHostsFile ~no-such-user/kh for musica .* an unknown user"),
        ("userknownhostsfile = it's", "UserKnownHostsFile it's for musica lacks a quotation mark"),
    ],
)
def test_what_cannot_be_followed_is_an_error(config: Path, text: str, message: str) -> None:
    config.write_text(text)
    with pytest.raises(ConfigurationError, match=message) as refused:
        read_route(settings())
    assert ".ssh/config" in str(refused.value)


@pytest.mark.parametrize(
    "host",
    [
        *("xy12345@musica", "musica:2222", "-oProxyCommand=x", "mu sica", "ssh://musica"),
        *("musica..asc.ac.at", ".musica", f"{'m' * 64}.asc.ac.at"),
    ],
)
def test_a_host_is_a_name_and_nothing_else(host: str) -> None:
    with pytest.raises(ConfigurationError, match="is not the name of a host"):
        read_route(settings(HOST=host))


@pytest.mark.parametrize("host", ["10.77.0.9", "::1"])
def test_addresses(host: str) -> None:
    assert read_route(settings(HOST=host))[0].host == host


@pytest.mark.parametrize("name", ["HOST", "KEY_PATH"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"SLURM_EDGE_NODE_{name} is not set"):
        read_route(settings(**{name: None}))


def test_include_and_match_are_reported_once_and_not_read(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    (config.parent / "more").write_text("User included\n")
    config.write_text(
        "Include more\n"
        "Match exec true\n  User matched\n  Port 1\n"
        "Host else\n  include = more\n"
        "Host musica\n  Port 2222\n  User right\n"
    )
    for _ in range(2):
        login, _ = read_route(settings())
        assert (login.user, login.port) == ("right", 2222)
    assert [message.split(" is ignored")[0] for message in caplog.messages] == [
        f"{config}:1: Include",
        f"{config}:2: Match",
        f"{config}:6: Include",
    ]


def test_options_that_change_whom_one_trusts_are_reported_where_they_apply(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config.write_text("Host else\nProxyCommand nc\nHost musica\nHostKeyAlias other\nProxyCommand none\n")
    login, _ = read_route(settings())
    assert login.host == "musica"
    assert caplog.messages == [f"{config}: hostkeyalias is ignored here, though it is set for musica"]


def test_lookups_in_the_dns_are_not_for_the_config_to_order(config: Path) -> None:
    """paramiko would resolve names, and fail where there is no CanonicalDomains."""
    config.write_text("CanonicalizeHostname yes\n")
    assert read_route(settings())[0].host == "musica"


def test_a_config_that_cannot_be_read_is_an_error(config: Path) -> None:
    config.mkdir()
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        read_route(settings())
