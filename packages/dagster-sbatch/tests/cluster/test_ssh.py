"""Connections to the simulated site: logging in, refusals, the way there, and what the user's own files may not do."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fabric
import paramiko
import pytest

from dagster_sbatch.settings import Settings
from dagster_sbatch.ssh import AuthenticationError, HostKeyError, UnreachableError, connect
from dagster_sbatch.ssh import connection as module
from dagster_sbatch.ssh.host_key import warn_once
from slurm_in_a_box import CERTIFICATE_USER, PLAIN_KEY_USER, TCSH_USER, SimulatedSite, User, wait_until
from slurm_in_a_box.keys import make_key

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def home(site: SimulatedSite, client_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home with the centre's line in ~/.ssh/known_hosts, and a valid key with its certificate."""
    warn_once.cache_clear()
    monkeypatch.setenv("HOME", str(client_home))
    site.mint_certificate(client_home / ".ssh/id_musica")
    return client_home


def settings(site: SimulatedSite, user: User = CERTIFICATE_USER, **values: object) -> Settings:
    all_values = {"HOST": site.login.address, "USER": user.name, "KEY_PATH": "~/.ssh/id_musica"} | values
    return Settings.model_validate({f"SLURM_EDGE_NODE_{name}": value for name, value in all_values.items()})


def nothing(_: Settings) -> None:
    pass


def hostname(connection: fabric.Connection) -> str:
    return str(connection.run("hostname", hide=True).stdout.split()[-1])


def no_transport_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if isinstance(thread, paramiko.Transport)]


# Logging in


@pytest.mark.smoke
def test_both_login_nodes_are_trusted_by_the_one_line_of_their_authority(site: SimulatedSite) -> None:
    seen = set()

    def both() -> bool:
        with connect(settings(site), nothing) as connection:
            seen.add((hostname(connection), connection.transport.host_key.asbytes()))
        return len(seen) == 2

    wait_until(both, "both login nodes", 60)
    assert {name for name, _ in seen} == {"login01", "login02"}


def test_a_plain_key_where_the_centre_takes_one(site: SimulatedSite) -> None:
    with connect(settings(site, PLAIN_KEY_USER, KEY_PATH=site.login.plain_key), nothing) as connection:
        assert connection.run("id -un", hide=True).stdout.endswith("\npk67890\n")


def test_a_channel_carries_bytes_and_keeps_stderr_apart(site: SimulatedSite) -> None:
    data = bytes(range(256)) * 4096
    with connect(settings(site, TCSH_USER, KEY_PATH=_key_of(site, TCSH_USER)), nothing) as connection:
        channel = connection.transport.open_session()
        assert channel.in_window_size == 2 * 1024**2
        channel.exec_command("echo apart >/dev/stderr; cat")
        sender = threading.Thread(target=lambda: (channel.sendall(data), channel.shutdown_write()))
        sender.start()
        assert channel.makefile("rb").read() == data
        assert channel.makefile_stderr("rb").read() == b"apart\n"
        assert channel.recv_exit_status() == 0
        sender.join()


def _key_of(site: SimulatedSite, user: User) -> Path:
    key = Path("~/.ssh").expanduser() / user.name
    site.mint_certificate(key, user)
    return key


def test_small_packets_go_at_once_and_silence_is_broken(site: SimulatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEPALIVE_SECONDS", 0.2)
    with connect(settings(site), nothing) as connection:
        assert connection.transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        sent = connection.transport.packetizer._Packetizer__sequence_number_out
        wait_until(lambda: connection.transport.packetizer._Packetizer__sequence_number_out > sent, "keepalive")


def test_the_refresh_comes_before_each_attempt_and_gets_the_settings(site: SimulatedSite, home: Path) -> None:
    asked, calls = settings(site), []
    certificate = home / ".ssh/id_musica-cert.pub"

    def refresh(given: Settings) -> None:
        calls.append(given)
        site.mint_certificate(home / ".ssh/id_musica")

    certificate.unlink()
    with connect(asked, refresh) as connection:
        assert connection.is_connected
        assert calls == [asked]
        certificate.unlink()
        site.faults.drop_connections()
        wait_until(lambda: not connection.is_connected, "the end of the connection")
        connection.open()
        assert hostname(connection).startswith("login0")
        assert calls == [asked, asked]
        with site.faults.ssh_refused(), pytest.raises(UnreachableError):
            connect(asked, refresh)
        assert len(calls) == 3


def test_closing_leaves_nothing(site: SimulatedSite) -> None:
    with connect(settings(site), nothing):
        assert not no_transport_is_left()
    wait_until(no_transport_is_left, "the end of paramiko's threads")
    wait_until(lambda: not site.processes_on_login(), "the end of all processes on the login nodes")


# Refusals


def refusal(asked: Settings) -> str:
    with pytest.raises(AuthenticationError) as refused:
        connect(asked, nothing)
    wait_until(no_transport_is_left, "the end of paramiko's threads")
    return str(refused.value)


def test_a_key_without_certificate(site: SimulatedSite, home: Path) -> None:
    (home / ".ssh/id_musica-cert.pub").unlink()
    text = refusal(settings(site))
    assert "has refused to log in 'xy12345'" in text
    assert "without a certificate" in text
    assert "scripts/refresh_step_auth.py" not in text


@pytest.mark.parametrize(
    ("validity", "advice"),
    [("-2h:-1h", "The certificate expired at "), ("+1h:+2h", "The certificate is not valid before ")],
)
def test_a_certificate_that_is_not_valid_now(site: SimulatedSite, home: Path, validity: str, advice: str) -> None:
    site.mint_certificate(home / ".ssh/id_musica", CERTIFICATE_USER, validity)
    assert advice in refusal(settings(site))


def test_another_users_certificate(site: SimulatedSite, home: Path) -> None:
    site.mint_certificate(home / ".ssh/id_musica", TCSH_USER)
    text = refusal(settings(site))
    assert "with the certificate id_musica-cert.pub, for tc24680; valid from" in text
    assert "The certificate is not for 'xy12345'. Set SLURM_EDGE_NODE_USER" in text


def test_an_account_that_may_not_log_in(site: SimulatedSite, home: Path) -> None:
    nobody = User("nobody", 65534)
    site.mint_certificate(home / ".ssh/id_musica", nobody)
    assert "does not trust its authority, or has closed the account" in refusal(settings(site, nobody))


def test_an_agent_with_the_right_key_is_not_asked(
    site: SimulatedSite, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = subprocess.check_output(["ssh-agent", "-s"], text=True)
    values = dict(part.split("=", 1) for part in started.replace("\n", ";").split(";") if "=" in part)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", values["SSH_AUTH_SOCK"])
        subprocess.run(["ssh-add", "-q", home / ".ssh/id_musica"], check=True, stderr=subprocess.DEVNULL)
        agent = paramiko.Agent()
        assert agent.get_keys()
        agent.close()
        make_key(home / "other")
        refusal(settings(site, KEY_PATH=str(home / "other")))
    finally:
        os.kill(int(values["SSH_AGENT_PID"]), signal.SIGTERM)


def test_a_right_key_that_nobody_named_is_not_found(site: SimulatedSite, home: Path) -> None:
    site.mint_certificate(home / ".ssh/id_ed25519")
    make_key(home / "other")
    refusal(settings(site, KEY_PATH=str(home / "other")))


# The way there


def fails(site: SimulatedSite) -> str:
    with pytest.raises(UnreachableError) as failed:
        connect(settings(site), nothing)
    wait_until(no_transport_is_left, "the end of paramiko's threads")
    return str(failed.value)


def test_refused(site: SimulatedSite) -> None:
    with site.faults.ssh_refused():
        assert "it refuses connections" in fails(site)
    connect(settings(site), nothing).close()


def test_frozen(site: SimulatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_SECONDS", 2.0)
    with site.faults.login_frozen():
        begun = time.monotonic()
        assert "cannot be reached" in fails(site)
        assert time.monotonic() - begun < 20
    connect(settings(site), nothing).close()


def test_slow_is_no_failure(site: SimulatedSite) -> None:
    with site.faults.login_slow(delay=0.5), connect(settings(site), nothing) as connection:
        assert hostname(connection).startswith("login0")


def test_dropped_in_the_middle_of_the_key_exchange(site: SimulatedSite) -> None:
    site.faults.drop_connections(after_bytes=500)
    assert "cannot be reached" in fails(site)
    connect(settings(site), nothing).close()


# Host keys, on the way


@pytest.mark.smoke
def test_an_unknown_host_key(site: SimulatedSite, home: Path) -> None:
    (home / ".ssh/known_hosts").unlink()
    with pytest.raises(HostKeyError, match="no authority is known for its certificate") as refused:
        connect(settings(site), nothing)
    assert site.login.address in str(refused.value)
    assert not (home / ".ssh/known_hosts").exists()


def test_options_of_the_config_that_would_weaken_it(site: SimulatedSite, home: Path) -> None:
    (home / ".ssh/known_hosts").unlink()
    (home / ".ssh/config").write_text("Host *\nStrictHostKeyChecking no\nCheckHostIP no\nVerifyHostKeyDNS yes\n")
    with pytest.raises(HostKeyError):
        connect(settings(site), nothing)


def test_alias_of_the_config(site: SimulatedSite, home: Path) -> None:
    known_hosts = home / "centre"
    (home / ".ssh/known_hosts").rename(known_hosts)
    (home / ".ssh/config").write_text(
        f"Host musica\nHostName {site.login.address}\nUser xy12345\nUserKnownHostsFile {known_hosts}\n"
    )
    with connect(settings(site, HOST="musica", USER=None), nothing) as connection:
        assert connection.run("id -un", hide=True).stdout.endswith("xy12345\n")


# Jump host


@pytest.fixture
def through(site: SimulatedSite, home: Path) -> Callable[[str], Settings]:
    """Writes known_hosts for the machines named, and returns settings that reach login02 through login01."""
    login01, login02 = (site.machines[name].address for name in ("login01", "login02"))
    (home / ".ssh/config").write_text(f"Host target\nHostName {login02}\nProxyJump {login01}\n")
    authority = (home / ".ssh/known_hosts").read_text().split(maxsplit=2)[2]

    def known(machines: str) -> Settings:
        names = ",".join(site.machines[name].address for name in machines.split())
        (home / ".ssh/known_hosts").write_text(f"@cert-authority {names} {authority}")
        return settings(site, HOST="target")

    return known


def test_through_a_jump_host(site: SimulatedSite, through: Callable[[str], Settings]) -> None:
    calls: list[Settings] = []
    with connect(through("login01 login02"), calls.append) as connection:
        assert hostname(connection) == "login02"
        assert connection.run("echo $SSH_CONNECTION", hide=True).stdout.split()[-4] == site.machines["login01"].address
        assert len(calls) == 1
    wait_until(no_transport_is_left, "the end of both connections")


@pytest.mark.parametrize(("known", "untrusted"), [("login02", "login01"), ("login01", "login02")])
def test_both_host_keys_are_checked(
    site: SimulatedSite, through: Callable[[str], Settings], known: str, untrusted: str
) -> None:
    with pytest.raises(HostKeyError) as refused:
        connect(through(known), nothing)
    assert str(refused.value).startswith(f"{site.machines[untrusted].address} (port 22) is not trusted")
    wait_until(no_transport_is_left, "the end of both connections")


def test_the_jump_host_cannot_reach_the_login_node(
    site: SimulatedSite, through: Callable[[str], Settings], home: Path
) -> None:
    asked = through("login01 login02").model_copy(update={"edge_node_port": 9})
    asked.model_fields_set.add("edge_node_port")
    with pytest.raises(
        UnreachableError, match=r"\(port 9\) cannot be reached through the jump host .*Connect"
    ) as failed:
        connect(asked, nothing)
    assert site.machines["login01"].address in str(failed.value)
    wait_until(no_transport_is_left, "the end of both connections")


def test_the_jump_host_is_down(site: SimulatedSite, home: Path) -> None:
    (home / ".ssh/config").write_text(f"ProxyJump {site.login.address}:23\n")
    with pytest.raises(UnreachableError, match=r"\(port 23\) cannot be reached: it refuses connections"):
        connect(settings(site, HOST=site.machines["login02"].address), nothing)


# What fabric would read


def test_fabrics_and_invokes_own_files_are_not_read(
    site: SimulatedSite, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = "{user: nobody, port: 1, gateway: x, forward_agent: true, connect_kwargs: {password: x}, run: {warn: true}}"
    for name in (".fabric.yml", ".fabric.yaml", ".invoke.yml", "fabric.yml", "invoke.yml"):
        (home / name).write_text(files)
    (home / ".ssh/config").write_text("ForwardAgent yes\nConnectTimeout 0\nProxyCommand false\n")
    for name in ("FABRIC_USER", "FABRIC_GATEWAY", "INVOKE_RUN_WARN"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.chdir(home)
    with connect(settings(site), nothing) as connection:
        assert (connection.user, connection.port, connection.gateway) == ("xy12345", 22, None)
        assert not connection.forward_agent
        assert not connection.config.run.warn
        assert "password" not in connection.connect_kwargs
        assert hostname(connection).startswith("login0")
