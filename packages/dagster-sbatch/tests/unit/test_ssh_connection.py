"""What a server can do wrong before anybody is logged in, done by servers made for it; and paramiko's internals."""

import contextlib
import inspect
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import paramiko
import pytest

from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway.agent.server import HELLO
from dagster_sbatch.slurm.gateway.channel import choose_channel
from dagster_sbatch.slurm.gateway.link import AgainError, Link
from dagster_sbatch.ssh import AuthenticationError, HostKeyError, SshError, UnreachableError, connect
from dagster_sbatch.ssh import connection as module
from slurm_in_a_box import wait_until
from unit.ssh_forge import Forge, needs_sshd, start

Behaviour = Callable[[socket.socket], None]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After every test, no thread of paramiko is left."""
    yield
    wait_until(
        lambda: not [t for t in threading.enumerate() if isinstance(t, paramiko.Transport)], "end of threads", 10
    )


@contextlib.contextmanager
def server(behave: Behaviour) -> Iterator[int]:
    """A server that does one thing with the first connection; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            accepted, _ = listening.accept()
            with accepted:
                behave(accepted)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(60)
        assert not thread.is_alive()


def as_server(forge: Forge, interface: paramiko.ServerInterface) -> Behaviour:
    """Serve a connection by SSH, as this interface says, which gets its `transport`."""

    def serve(connection: socket.socket) -> None:
        interface.transport = transport = paramiko.Transport(connection)
        transport.add_server_key(paramiko.PKey.from_path(forge.key("ed25519")))
        # One side may have hung up before this has looked.
        with contextlib.suppress(EOFError, ConnectionError, paramiko.SSHException):
            transport.start_server(server=interface)
        transport.join(60)

    return serve


def settings(forge: Forge, port: int, host: str = "127.0.0.1") -> Settings:
    return Settings(
        SLURM_EDGE_NODE_HOST=host,
        SLURM_EDGE_NODE_PORT=port,
        SLURM_EDGE_NODE_USER="xy12345",
        SLURM_EDGE_NODE_KEY_PATH=forge.key("ed25519-user"),
    )


def unreachable(forge: Forge, port: int, host: str = "127.0.0.1") -> str:
    """The text of the error; the attempt is made once, after one refresh."""
    refreshed: list[Settings] = []
    asked = settings(forge, port, host)
    with pytest.raises(UnreachableError) as caught:
        connect(asked, refreshed.append)
    assert refreshed == [asked]
    return str(caught.value)


def limit_key_exchange(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Set the limit that begins with the connection; that for the greeting stays."""
    start_client = module.Transport.start_client
    monkeypatch.setattr(
        module.Transport,
        "start_client",
        lambda transport, event=None, timeout=None: start_client(transport, event, seconds),
    )


def wait_for_end(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


def test_name_that_is_not_known(forge: Forge) -> None:
    text = unreachable(forge, 22, "login.invalid")
    assert text.startswith("login.invalid (port 22) cannot be reached: the name is not known (")


def test_refused(forge: Forge) -> None:
    with socket.socket() as claim:  # bound, and it does not listen
        claim.bind(("127.0.0.1", 0))
        port = claim.getsockname()[1]
        assert unreachable(forge, port).startswith(f"127.0.0.1 (port {port}) cannot be reached: it refuses connections")


def test_dropped_before_the_greeting_as_by_max_startups(forge: Forge) -> None:
    with server(lambda connection: None) as port:
        assert "banner" in unreachable(forge, port)


def test_no_ssh_server(forge: Forge) -> None:
    with server(lambda connection: connection.sendall(b"HTTP/1.0 400\r\n" * 100)) as port:
        assert "protocol" in unreachable(forge, port)


def test_a_greeting_does_not_control_the_terminal(forge: Forge) -> None:
    says = pytest.raises(SshError, match=r"Incompatible version \(\?\[2J instead")
    with server(lambda connection: connection.sendall(b"SSH-\x1b[2J-x\r\n")) as port, says:
        connect(settings(forge, port), lambda _: None)


def test_no_answer_to_tcp(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.5)
    with socket.socket() as listening, socket.socket() as waiting:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        waiting.connect(listening.getsockname())  # takes the only place in the queue
        assert "timed out" in unreachable(forge, listening.getsockname()[1])


def test_no_greeting(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_SECONDS", 1.0)
    limit_key_exchange(monkeypatch, 60)
    with server(wait_for_end) as port:
        assert "banner" in unreachable(forge, port)


def test_silence_within_the_key_exchange(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paramiko itself would wait for ever: its own limit ends with the server's first packet."""
    limit_key_exchange(monkeypatch, 2.0)

    def greet_and_offer(connection: socket.socket) -> None:
        transport = paramiko.Transport(connection)
        transport.add_server_key(paramiko.PKey.from_path(forge.key("ed25519")))
        transport.server_object = paramiko.ServerInterface()
        transport.server_mode = True
        connection.sendall(b"SSH-2.0-silent\r\n")
        transport._send_kex_init()
        connection.settimeout(None)
        wait_for_end(connection)

    with server(greet_and_offer) as port:
        assert "no key exchange within 2.0 s" in unreachable(forge, port)


class SilentLogin(paramiko.ServerInterface):  # type: ignore[misc]
    """Lets nobody in, and takes its time."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.over.wait(60)
        return int(paramiko.AUTH_FAILED)

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"


def test_silence_within_the_login(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AUTHENTICATION_SECONDS", 1.0)
    silent = SilentLogin()

    with server(as_server(forge, silent)) as port:
        (forge.folder / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {forge.public('ed25519')}\n")
        assert "no answer to the login within 1.0 s" in unreachable(forge, port)
        silent.over.set()


class Hangup(paramiko.ServerInterface):  # type: ignore[misc]
    """Closes the connection when somebody wants in."""

    transport: paramiko.Transport

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.transport.close()
        return int(paramiko.AUTH_FAILED)

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"


def test_closed_within_the_login_is_no_refusal_of_the_key(forge: Forge) -> None:
    with server(as_server(forge, Hangup())) as port:
        (forge.folder / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {forge.public('ed25519')}\n")
        assert "cannot be reached" in unreachable(forge, port)


class AsksForMore(paramiko.ServerInterface):  # type: ignore[misc]
    """Lets nobody in with a key alone."""

    def __init__(self, answer: int) -> None:
        self._answer = answer

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return self._answer

    def get_allowed_auths(self, username: str) -> str:
        return "publickey,keyboard-interactive" if self._answer == paramiko.AUTH_FAILED else "keyboard-interactive"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (paramiko.AUTH_FAILED, "keyboard-interactive is the login for people: a link to open in a browser"),
        (paramiko.AUTH_PARTIALLY_SUCCESSFUL, "requires a second factor: keyboard-interactive. Only a person"),
    ],
)
def test_a_login_for_people_is_named_and_not_waited_for(forge: Forge, answer: int, text: str) -> None:
    with server(as_server(forge, AsksForMore(answer))) as port:
        (forge.folder / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {forge.public('ed25519')}\n")
        with pytest.raises(AuthenticationError) as raised:
            connect(settings(forge, port), lambda _: None)
    assert text in str(raised.value)
    assert ("does not trust its authority" in str(raised.value)) is False


class Welcome(paramiko.ServerInterface):  # type: ignore[misc]
    """Lets everybody in, and starts what they want."""

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return int(paramiko.AUTH_SUCCESSFUL)

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return int(paramiko.OPEN_SUCCEEDED)

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        return True


def test_a_connection_that_is_lost_within_a_later_key_exchange_is_replaced(forge: Forge) -> None:
    """Both sides make new keys now and then; a request that is sent then must not fail by an error of paramiko."""

    def serve(connection: socket.socket) -> None:
        transport = paramiko.Transport(connection)
        transport.add_server_key(paramiko.PKey.from_path(forge.key("ed25519")))
        transport.start_server(server=Welcome())
        session = transport.accept(60)
        session.sendall(f"{HELLO}\n".encode())
        transport.join(60)

    with server(serve) as port:
        (forge.folder / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {forge.public('ed25519')}\n")
        channel = choose_channel(settings(forge, port), (), lambda _: None)()
        link = Link(lambda: channel)
        wait_until(lambda: channel.receive() or channel._greeted, "the greeting")
        transport = channel._connection.transport  # type: ignore[attr-defined]
        transport.clear_to_send_timeout = 0.1
        transport.clear_to_send.clear()  # as from the beginning of an exchange to its end
        with pytest.raises(AgainError, match="Key-exchange timed out"):
            next(link.exchange([{"do": "server.ping"}]))
        channel.close()


class Impostor(paramiko.Ed25519Key):  # type: ignore[misc]
    """Shows what another machine has shown, and signs with a key of its own."""

    shown = b""

    def asbytes(self) -> bytes:
        return self.shown

    def get_name(self) -> str:
        return "ssh-ed25519-cert-v01@openssh.com"


def test_a_copied_certificate_without_its_private_key_is_worth_nothing(forge: Forge) -> None:
    forge.certify("ed25519", "-s ecdsa-ca -h -n 127.0.0.1")
    (forge.folder / ".ssh/known_hosts").write_text(f"@cert-authority * {forge.public('ecdsa-ca')}\n")
    impostor = Impostor.from_private_key_file(str(forge.key("ed25519-2")))
    impostor.shown = paramiko.pkey.PublicBlob.from_file(f"{forge.key('ed25519')}-cert.pub").key_blob

    def serve(connection: socket.socket) -> None:
        transport = paramiko.Transport(connection)
        transport.server_key_dict["ssh-ed25519-cert-v01@openssh.com"] = impostor
        transport.start_server(threading.Event(), paramiko.ServerInterface())
        transport.join(60)

    with server(serve) as port, pytest.raises(HostKeyError, match="has not proved that it holds the host key"):
        connect(settings(forge, port), lambda _: None)


def test_a_missing_key_is_told_before_anybody_is_bothered(forge: Forge) -> None:
    (forge.key("ed25519-user")).rename(forge.folder / "elsewhere")
    asked = settings(forge, 9).model_copy(update={"edge_node_key_path": forge.folder / "ed25519-user-missing"})
    with pytest.raises(AuthenticationError, match=r"ed25519-user-missing .* does not exist"):
        connect(asked, lambda _: None)


def test_what_the_refresh_raises_passes_and_nobody_is_bothered(forge: Forge) -> None:
    def refresh(_: Settings) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        connect(settings(forge, 9), refresh)


@needs_sshd
def test_no_algorithm_in_common_is_not_worth_another_try(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    sshd = forge.sshd("ed25519", extra="Ciphers chacha20-poly1305@openssh.com")
    processes: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(module, "_connect_tcp", lambda _: start(sshd, processes))
    with pytest.raises(SshError, match="have no SSH algorithm in common") as refused:
        connect(settings(forge, 22), lambda _: None)
    assert not isinstance(refused.value, UnreachableError)
    processes[0].wait(60)


def test_errors_print_nothing_of_their_own(forge: Forge) -> None:
    """Paramiko logs a traceback for each; the error says it all."""
    code = (
        "import os; from dagster_sbatch.settings import Settings; from dagster_sbatch.ssh import connect\n"
        "try: connect(Settings.model_validate(os.environ), lambda _: None)\n"
        "except Exception as error: print(type(error).__name__)"
    )
    with server(lambda connection: None) as port:
        environment = {
            "HOME": str(forge.folder),
            "SLURM_EDGE_NODE_HOST": "127.0.0.1",
            "SLURM_EDGE_NODE_PORT": str(port),
            "SLURM_EDGE_NODE_USER": "xy12345",
            "SLURM_EDGE_NODE_KEY_PATH": str(forge.key("ed25519-user")),
        }
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("UnreachableError\n", "")


# What of paramiko is not public, and is built upon


def test_paramiko_takes_the_order_of_host_key_algorithms_from_preferred_keys() -> None:
    assert isinstance(inspect.getattr_static(paramiko.Transport, "preferred_keys"), property)
    with socket.socket() as sock:
        names = paramiko.Transport(sock).preferred_keys
    assert {"ssh-ed25519", "ssh-ed25519-cert-v01@openssh.com", "rsa-sha2-512-cert-v01@openssh.com"} <= set(names)


def test_paramiko_gives_the_host_key_to_verify_key() -> None:
    assert list(inspect.signature(paramiko.Transport._verify_key).parameters) == ["self", "host_key", "sig"]


def test_paramiko_exchanges_keys_before_it_logs_in() -> None:
    source = inspect.getsource(paramiko.SSHClient.connect)
    assert source.index("start_client") < source.index("auth_strategy.authenticate")


def test_window_of_a_channel_is_two_megabytes() -> None:
    with socket.socket() as sock:
        assert paramiko.Transport(sock).default_window_size == 2 * 1024**2


def test_ssh_is_imported_without_its_libraries() -> None:
    code = "import sys, dagster_sbatch.ssh; print({'fabric', 'paramiko', 'cryptography', 'dagster'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_an_unknown_key_ends_it_before_the_user_key_is_shown(forge: Forge) -> None:
    shown = []

    class Curious(SilentLogin):
        def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
            shown.append(username)
            return int(paramiko.AUTH_SUCCESSFUL)

    def serve(connection: socket.socket) -> None:
        transport = paramiko.Transport(connection)
        transport.add_server_key(paramiko.PKey.from_path(forge.key("ed25519")))
        transport.start_server(threading.Event(), Curious())  # with an event it bears that the client leaves
        transport.join(60)

    with server(serve) as port, pytest.raises(HostKeyError):
        connect(settings(forge, port), lambda _: None)
    assert shown == []
