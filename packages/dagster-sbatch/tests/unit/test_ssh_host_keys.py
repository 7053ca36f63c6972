"""Which host keys are trusted: a real sshd shows them, and OpenSSH's own ssh must come to the same verdict."""

import base64
from pathlib import Path

import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm import load_site
from dagster_sbatch.ssh import HostKeyError
from dagster_sbatch.ssh.host_key import KnownHosts, check
from unit.ssh_forge import Forge, needs_sshd, openssh_trusts, our_error

pytestmark = needs_sshd

HOST = "musica.vie.example"
CERTIFIED = "-s ecdsa-ca -h -n musica.vie.example,login01.vie.example"
AUTHORITY = "@cert-authority *.vie.example <ecdsa-ca>"


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Forge:
    return Forge(tmp_path_factory.mktemp("forge"))


PLAIN = {
    "known": (f"{HOST} <ed25519>", True),
    "unknown": ("other.example <ed25519>", False),
    "nothing known at all": ("", False),
    "changed": (f"{HOST} <ed25519-2>", False),
    "several of one type": (f"{HOST} <ed25519-2>\n{HOST} <ed25519>\n{HOST} <ed25519-3>", True),
    "another type is known": (f"{HOST} <rsa>", True),
    "the last type is known": (f"{HOST} <ecdsa>", True),
    "another type is known, but changed": (f"{HOST} <rsa-2>", False),
    "pattern": ("*.vie.exam??e <ed25519>", True),
    "negated": (f"*.vie.example,!{HOST} <ed25519>", False),
    "name in capitals": ("MUSICA.VIE.EXAMPLE <ed25519>", True),
    "only on another port": (f"[{HOST}]:2222 <ed25519>", False),
    "revoked": (f"{HOST} <ed25519>\n@revoked * <ed25519>", False),
    "another one is revoked": (f"{HOST} <ed25519>\n@revoked * <ed25519-2>", True),
    "revoked for another host": (f"{HOST} <ed25519>\n@revoked other.example <ed25519>", True),
    "as an authority only": (f"@cert-authority {HOST} <ed25519>", False),
    "among broken lines": (f"{HOST} ssh-ed25519 AAAA\n{HOST}\n\n{HOST} <ed25519>\n{HOST} x y z", True),
}


def verdicts(
    forge: Forge, folder: Path, sshd: list[str], lines: str, host: str = HOST, port: int = 22
) -> tuple[bool, bool]:
    """What OpenSSH's ssh and what we make of it."""
    known_hosts = folder / "known_hosts"
    known_hosts.write_text(forge.lines(lines) + "\n")
    arguments = (sshd, known_hosts, host, port, forge.key("ed25519-user"))
    return openssh_trusts(*arguments), our_error(*arguments) is None


@pytest.mark.parametrize("case", PLAIN)
def test_plain_keys(forge: Forge, tmp_path: Path, case: str) -> None:
    lines, trusted = PLAIN[case]
    sshd = forge.sshd("ed25519", "rsa", "ecdsa")
    assert verdicts(forge, tmp_path, sshd, lines) == (trusted, trusted)


CERTIFICATES = {
    "trusted": (CERTIFIED, AUTHORITY, True),
    "authority's name does not fit": (CERTIFIED, "@cert-authority *.wien.example <ecdsa-ca>", False),
    "another authority": ("-s ecdsa-ca2 -h -n musica.vie.example", AUTHORITY, False),
    "two authorities": (CERTIFIED, f"@cert-authority * <rsa-ca>\n{AUTHORITY}", True),
    "another name": ("-s ecdsa-ca -h -n login01.vie.example", AUTHORITY, False),
    "part of a name": ("-s ecdsa-ca -h -n musica", AUTHORITY, False),
    "expired": (f"{CERTIFIED} -V -2h:-1h", AUTHORITY, False),
    "not valid yet": (f"{CERTIFIED} -V +1h:+2h", AUTHORITY, False),
    "valid now": (f"{CERTIFIED} -V -1h:+1h", AUTHORITY, True),
    "critical option": (f"{CERTIFIED} -O critical:verify-weather=1", AUTHORITY, False),
    "extension": (f"{CERTIFIED} -O extension:weather=fine", AUTHORITY, True),
    "signed with SHA-1": ("-s rsa-ca -t ssh-rsa -h -n musica.vie.example", "@cert-authority * <rsa-ca>", False),
    "signed with RSA": ("-s rsa-ca -t rsa-sha2-256 -h -n musica.vie.example", "@cert-authority * <rsa-ca>", True),
    "signed with ed25519": ("-s ed25519-ca -h -n musica.vie.example", "@cert-authority * <ed25519-ca>", True),
    "authority revoked": (CERTIFIED, f"{AUTHORITY}\n@revoked * <ecdsa-ca>", False),
    "key revoked": (CERTIFIED, f"{AUTHORITY}\n@revoked * <ed25519>", False),
    "expired, but its plain key is known": (f"{CERTIFIED} -V -2h:-1h", f"{AUTHORITY}\n{HOST} <ed25519>", True),
    "unknown authority, but its plain key is known": (CERTIFIED, f"{HOST} <ed25519>", True),
    "expired, and its plain key has changed": (f"{CERTIFIED} -V -2h:-1h", f"{AUTHORITY}\n{HOST} <ed25519-2>", False),
    "trusted, though a plain key has changed": (CERTIFIED, f"{AUTHORITY}\n{HOST} <ed25519-2>", True),
    "the authority as a plain key": (CERTIFIED, f"{HOST} <ecdsa-ca>", False),
    "wildcard in the certificate": ("-s ecdsa-ca -h -n *.vie.example", AUTHORITY, False),
}


@pytest.mark.parametrize("case", CERTIFICATES)
def test_certificates(forge: Forge, tmp_path: Path, case: str) -> None:
    options, lines, trusted = CERTIFICATES[case]
    forge.certify("ed25519", options)
    sshd = forge.sshd("ed25519", certified="ed25519")
    assert verdicts(forge, tmp_path, sshd, lines) == (trusted, trusted)


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_every_kind_of_host_key_can_be_certified(forge: Forge, tmp_path: Path, kind: str) -> None:
    forge.certify(kind, CERTIFIED)
    assert verdicts(forge, tmp_path, forge.sshd(kind, certified=kind), AUTHORITY) == (True, True)


PORTS = {
    "known there": (f"[{HOST}]:2222 <ed25519>", True),
    "known on port 22 only": (f"{HOST} <ed25519>", True),
    "changed there, known on port 22": (f"[{HOST}]:2222 <ed25519-2>\n{HOST} <ed25519>", False),
    "known on a third port": (f"[{HOST}]:2223 <ed25519>", False),
    "revoked there": (f"[{HOST}]:2222 <ed25519>\n@revoked [{HOST}]:2222 <ed25519>", False),
}


@pytest.mark.parametrize("case", PORTS)
def test_another_port(forge: Forge, tmp_path: Path, case: str) -> None:
    lines, trusted = PORTS[case]
    assert verdicts(forge, tmp_path, forge.sshd("ed25519"), lines, port=2222) == (trusted, trusted)


@pytest.mark.parametrize("lines", [AUTHORITY, "@cert-authority [*.vie.example]:2222 <ecdsa-ca>"])
def test_certificate_on_another_port_is_for_the_bare_name(forge: Forge, tmp_path: Path, lines: str) -> None:
    forge.certify("ed25519", CERTIFIED)
    sshd = forge.sshd("ed25519", certified="ed25519")
    assert verdicts(forge, tmp_path, sshd, lines, port=2222) == (True, True)


def test_name_asked_for_in_capitals(forge: Forge, tmp_path: Path) -> None:
    forge.certify("ed25519", CERTIFIED)
    sshd = forge.sshd("ed25519", certified="ed25519")
    assert verdicts(forge, tmp_path, sshd, AUTHORITY, host=HOST.upper()) == (True, True)


def test_stricter_than_openssh_a_certificate_without_names(forge: Forge, tmp_path: Path) -> None:
    forge.certify("ed25519", "-s ecdsa-ca -h")
    sshd = forge.sshd("ed25519", certified="ed25519")
    assert not verdicts(forge, tmp_path, sshd, AUTHORITY)[1]  # OpenSSH: older versions trust it


def test_stricter_than_openssh_a_key_revoked_on_another_port(forge: Forge, tmp_path: Path) -> None:
    lines = f"[{HOST}]:2222 <ed25519>\n@revoked {HOST} <ed25519>"
    assert verdicts(forge, tmp_path, forge.sshd("ed25519"), lines, port=2222) == (True, False)


SITE = {
    "nothing is known": ("", True),
    "another host is known": ("other.example <ed25519-2>\n@cert-authority *.other.example <ecdsa-ca2>", True),
    "known on another port only": (f"[{HOST}]:2222 <ed25519-2>", True),
    "the same authority": (AUTHORITY, True),
    "another authority": ("@cert-authority * <ecdsa-ca2>", False),
    "the plain key": (f"{HOST} <ed25519>", True),
    "another plain key": (f"{HOST} <ed25519-2>", False),
    "the authority is revoked": ("@revoked * <ecdsa-ca>", False),
    "the key is revoked": ("@revoked * <ed25519>", False),
    "the authority is revoked for another host": ("@revoked other.example <ecdsa-ca>", True),
}


def with_site(forge: Forge, folder: Path, lines: str, site: str = AUTHORITY) -> HostKeyError | None:
    """Our error where the user's known_hosts has those lines, and the site's entry the other one."""
    forge.certify("ed25519", CERTIFIED)
    known_hosts = folder / "known_hosts"
    known_hosts.write_text(forge.lines(lines) + "\n")
    sshd = forge.sshd("ed25519", certified="ed25519")
    return our_error(sshd, known_hosts, HOST, 22, forge.key("ed25519-user"), (forge.lines(site),))


@pytest.mark.parametrize("case", SITE)
def test_the_sites_authority_counts_where_the_users_lines_do_not_decide(
    forge: Forge, tmp_path: Path, case: str
) -> None:
    lines, trusted = SITE[case]
    assert (with_site(forge, tmp_path, lines) is None) == trusted


def test_the_sites_authority_counts_for_its_own_hosts_only(forge: Forge, tmp_path: Path) -> None:
    assert with_site(forge, tmp_path, "", "@cert-authority *.wien.example <ecdsa-ca>") is not None


def test_the_text_for_a_users_line_that_keeps_the_sites_authority_out(forge: Forge, tmp_path: Path) -> None:
    text = str(with_site(forge, tmp_path, f"{HOST} <ed25519-2>"))
    assert "/known_hosts:1: ssh-ed25519 SHA256:" in text
    assert "The site's entry names an authority for it, SHA256:" in text
    other = str(with_site(forge, tmp_path, "", "@cert-authority * <ecdsa-ca2>"))
    assert "SUPERCOMPUTER_SITE_OVERRIDES: @cert-authority ecdsa-sha2-nistp256 SHA256:" in other
    assert "names an authority for it" not in other


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"{HOST} <ed25519>", "does not begin with @cert-authority"),
        ("@revoked * <ed25519>", "does not begin with @cert-authority"),
        ("@cert-authority *.vie.example", "needs names"),
        ("@cert-authority * ssh-rsa AAAA", "cut short or damaged"),
        ("", "does not begin with @cert-authority"),
    ],
)
def test_a_line_of_the_site_that_is_no_authority_is_refused(forge: Forge, line: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"\['musica'\]\['host_authorities'\]\[0\]: .*{reason}"):
        load_site({"musica": {"host_authorities": [forge.lines(line)]}}, "musica")


def refused(forge: Forge, folder: Path, lines: str, certificate: str = "") -> str:
    """The text of the error, with the forge's key names in place of fingerprints."""
    if certificate:
        forge.certify("ed25519", certificate)
    known_hosts = folder / "known_hosts"
    if lines:
        known_hosts.write_text(forge.lines(lines) + "\n")
    sshd = forge.sshd("ed25519", certified="ed25519" if certificate else "")
    error = our_error(sshd, known_hosts, HOST, 22, forge.key("ed25519-user"))
    assert error is not None
    text = str(error).replace(str(known_hosts), "KNOWN_HOSTS")
    for name in ("ed25519", "ed25519-2", "ecdsa-ca", "ecdsa-ca2"):
        file = folder / f"{name}.known"
        file.write_text(f"x {forge.public(name)}\n")
        text = text.replace(str(KnownHosts.read([file]).entries[0]).split()[-1], f"<{name}>")
    return text


def test_text_for_an_unknown_key(forge: Forge, tmp_path: Path) -> None:
    text = refused(forge, tmp_path, "")
    assert text.startswith(
        f"{HOST} (port 22) is not trusted: its key is not known. It has shown\n  ssh-ed25519 <ed25519>\n"
        "Nothing is known for it in KNOWN_HOSTS (missing), /dev/null\n"
    )
    assert "fingerprints of its login nodes" in text


@pytest.mark.parametrize(
    ("known", "certificate"),
    [("ssh-ed25519 <ed25519-2>", ""), ("ecdsa-sha2-nistp256 <ecdsa-ca2>", CERTIFIED)],
    ids=["of the same type", "with a certificate"],
)
def test_text_for_a_changed_key(forge: Forge, tmp_path: Path, known: str, certificate: str) -> None:
    text = refused(forge, tmp_path, f"# comment\n{HOST} {known.split()[1]}", certificate)
    assert "its key differs from the known one. It has shown\n  ssh-ed25519 <ed25519>\n" in text
    assert ("\n  with a certificate for musica.vie.example, login01" in text) is bool(certificate)
    assert f"Known for it:\n  KNOWN_HOSTS:2: {known}\n" in text
    assert "Only if it is one of\nthem, correct the lines above" in text


def test_text_for_an_unknown_authority(forge: Forge, tmp_path: Path) -> None:
    text = refused(forge, tmp_path, "", f"{CERTIFIED} -V 20200102030405Z:20300102030405Z")
    assert "no authority is known for its certificate. It has shown\n  ssh-ed25519 <ed25519>\n" in text
    assert (
        "  with a certificate for musica.vie.example, login01.vie.example; valid from 2020-01-02 03:04:05 UTC to "
        "2030-01-02 03:04:05 UTC; signed by the authority <ecdsa-ca>\n"
    ) in text
    assert "`@cert-authority *.asc.ac.at ecdsa-sha2-nistp256`" in text
    assert "append it to KNOWN_HOSTS." in text


def test_the_names_in_a_certificate_do_not_write_the_text(forge: Forge, tmp_path: Path) -> None:
    """Whoever intercepts the connection chooses them, and could advise to trust him."""
    names = "'musica.vie.example\nTo trust it:\n  ssh-keyscan\x1b[2K'"
    text = refused(forge, tmp_path, "", f"-s ecdsa-ca -h -n {names}")
    assert "with a certificate for musica.vie.example?To trust it:?  ssh-keyscan?[2K; valid" in text


def test_text_for_another_authority(forge: Forge, tmp_path: Path) -> None:
    text = refused(forge, tmp_path, "@cert-authority *.vie.example <ecdsa-ca2>", CERTIFIED)
    assert "signed by another authority than the known one. It has shown" in text
    assert "valid from always to for ever; signed by the authority <ecdsa-ca>" in text
    assert "  KNOWN_HOSTS:1: @cert-authority ecdsa-sha2-nistp256 <ecdsa-ca2>\n" in text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("-s ecdsa-ca -h -n login01.vie.example", f"its certificate is not for the name {HOST}"),
        (f"{CERTIFIED} -V -2h:-1h", "its certificate expired at 20"),
        (f"{CERTIFIED} -V +1h:+2h", "its certificate is not valid before 20"),
        (f"{CERTIFIED} -O critical:weather=1", "its certificate has critical options that are not known: weather"),
        ("-s ecdsa-ca -h", f"its certificate is not for the name {HOST}"),
    ],
)
def test_texts_for_certificates_that_are_not_valid(forge: Forge, tmp_path: Path, options: str, reason: str) -> None:
    text = refused(forge, tmp_path, f"{AUTHORITY}\n{HOST} <ed25519-2>", options)
    assert f"is not trusted: {reason}" in text
    assert text.endswith("Tell your computing centre: only the centre can correct that.")


def test_text_for_sha1(forge: Forge, tmp_path: Path) -> None:
    text = refused(forge, tmp_path, "@cert-authority * <rsa-ca>", "-s rsa-ca -t ssh-rsa -h -n musica.vie.example")
    assert "its certificate is signed with SHA-1, which is not safe" in text


def test_text_for_a_revoked_key(forge: Forge, tmp_path: Path) -> None:
    text = refused(forge, tmp_path, f"{AUTHORITY}\n@revoked * <ecdsa-ca>", CERTIFIED)
    assert "its key is revoked" in text
    assert "  KNOWN_HOSTS:2: @revoked ecdsa-sha2-nistp256 <ecdsa-ca>\nDo not connect." in text


def test_no_text_tells_to_trust_what_was_just_shown(forge: Forge, tmp_path: Path) -> None:
    for lines in ("", f"{HOST} <ed25519-2>"):
        text = refused(forge, tmp_path, lines)
        assert "keyscan" not in text
        assert forge.public("ed25519").split()[1] not in text


# What no sshd shows, since it checks its own certificates: judged as if it had been shown


def judged(forge: Forge, folder: Path, blob: bytes) -> str:
    """The first line of the error, or empty if the authority's certificates are trusted and this is a good one."""
    known_hosts = folder / "known_hosts"
    known_hosts.write_text(forge.lines(AUTHORITY) + "\n")
    try:
        check(blob, HOST, 22, KnownHosts.read([known_hosts]))
    except HostKeyError as error:
        return str(error).splitlines()[0]
    return ""


def certificate(forge: Forge, options: str) -> bytes:
    forge.certify("ed25519", options)
    return base64.b64decode(Path(f"{forge.key('ed25519')}-cert.pub").read_bytes().split()[1])


def test_forged_certificates(forge: Forge, tmp_path: Path) -> None:
    good = certificate(forge, "-s ecdsa-ca -h -n musica.vie.example")
    assert judged(forge, tmp_path, good) == ""
    last = good[:-1] + bytes([good[-1] ^ 1])
    assert "has a forged or damaged signature" in judged(forge, tmp_path, last)
    other = certificate(forge, "-s ecdsa-ca -h -n secret.vie.example")
    renamed = other.replace(b"secret.vie.example", b"musica.vie.example")
    assert "has a forged or damaged signature" in judged(forge, tmp_path, renamed)


def test_a_users_certificate_from_the_same_authority_is_no_hosts(forge: Forge, tmp_path: Path) -> None:
    blob = certificate(forge, "-s ecdsa-ca -n musica.vie.example")
    assert "its certificate is a user's, not a host's" in judged(forge, tmp_path, blob)


@pytest.mark.parametrize("length", [0, 3, 40, 200])
def test_damaged_host_keys(forge: Forge, tmp_path: Path, length: int) -> None:
    blob = certificate(forge, CERTIFIED)[:length]
    assert "has shown a damaged host key" in judged(forge, tmp_path, blob)
