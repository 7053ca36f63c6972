"""From an authentik token to a certificate that opens the login node: a real step-ca and a real sshd."""

import os
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dagster_sbatch.auth import (
    BootstrapError,
    check_health,
    ensure_certificate,
    refresh,
)
from dagster_sbatch.auth.credentials_file import Credentials
from dagster_sbatch.auth.http import Http
from dagster_sbatch.auth.keys import certificate_path, public_path
from dagster_sbatch.setting_files import load_settings
from dagster_sbatch.ssh import AuthenticationError, connect
from resources import PROJECT
from slurm_in_a_box import SimulatedSite
from support import ROOT, access

pytestmark = pytest.mark.cluster


def test_each_of_the_four_ways_is_enough(
    site: SimulatedSite, variables: dict[str, str], without_secret: dict[str, str]
) -> None:
    key, file = access.key_of(variables), Path(variables["ASC_AUTHENTIK_CREDENTIALS_FILE"])
    # 3: an API token, which makes the credentials file
    refresh(access.settings_of(variables))
    assert access.logs_in(site, variables)
    # 1: a valid certificate, and nothing else
    stored = file.read_text()
    file.unlink()
    assert ensure_certificate(access.settings_of(without_secret))
    assert not file.exists()
    # 2: stored credentials, and nothing else
    file.touch(mode=0o600)
    file.write_text(stored)
    certificate_path(key).unlink()
    report = refresh(access.settings_of(without_secret))
    assert (report.issued_with, report.rotated_with) == ("stored", None)
    assert access.logs_in(site, variables)
    # 4: an app password, and nothing else
    file.unlink()
    certificate_path(key).unlink()
    password = {"ASC_OIDC_APP_PASSWORD": site.authentik.create_token(access.USER, "app_password", "by-hand")}
    settings = access.settings_of({**without_secret, **password})
    assert refresh(settings).issued_with == "direct"
    assert access.logs_in(site, variables)
    assert not file.exists()
    health = check_health(settings)
    assert health.verdict == "ok"
    assert any("nothing renews access: it ends when the app password" in note for note in health.notes)


def test_a_good_certificate_is_returned_without_asking_anybody(
    site: SimulatedSite, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = access.settings_of(variables)
    first = ensure_certificate(settings)
    monkeypatch.setattr(Http, "call", None)
    assert first is not None
    assert ensure_certificate(settings) == first
    assert first.principals == ("xy12345", "xy12345@sim.test")


@pytest.mark.smoke
def test_the_document_filled_in_and_otherwise_verbatim_works(
    site: SimulatedSite, variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, at_home = [], ("SLURM_EDGE_NODE_KEY_PATH", "ASC_AUTHENTIK_CREDENTIALS_FILE")
    for line in (ROOT / "envs" / ".env.musica.example").read_text().splitlines():
        name, is_set, _ = line.partition("=")
        ours = line.split("=")[1] if name in at_home else variables.get(name, "")
        lines.append(f"{name}={ours}" if is_set and not line.startswith("#") else line)
    path = tmp_path / "envs" / ".env.musica"
    path.parent.mkdir()
    path.touch(mode=0o600)
    path.write_text("\n".join(lines))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    monkeypatch.setenv("ASC_ALLOW_HTTP", variables["ASC_ALLOW_HTTP"])
    settings = load_settings(PROJECT.site_overrides, tmp_path)
    assert ensure_certificate(settings)
    home = tmp_path / "home"
    assert {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()} == {
        ".ssh/id_musica",
        ".ssh/id_musica.pub",
        ".ssh/id_musica-cert.pub",
        ".config/dagster-slurm/musica-auth.env",
        ".config/dagster-slurm/musica-auth.env.lock",
    }
    assert (home / ".ssh").stat().st_mode & 0o777 == 0o700
    assert access.logs_in(site, {"SLURM_EDGE_NODE_KEY_PATH": str(home / ".ssh/id_musica")})


def test_what_a_person_got_with_step_is_taken_as_it_is(
    site: SimulatedSite, without_secret: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    password = site.authentik.create_token(access.USER, "app_password", "by-hand")
    done = site.certificate_authority.sign_with_step(access.key_of(without_secret), site.id_token(password))
    assert done.returncode == 0, done.stderr
    before = {path: path.read_bytes() for path in access.key_of(without_secret).parent.glob("id_musica*")}
    assert len(before) == 3
    monkeypatch.setattr(Http, "call", None)
    settings = access.settings_of(without_secret)
    assert ensure_certificate(settings)
    assert {path: path.read_bytes() for path in before} == before
    assert "nothing renews access: it ends at" in check_health(settings).summary


def test_the_key_that_step_made_is_kept_when_its_certificate_is_renewed(
    site: SimulatedSite, variables: dict[str, str]
) -> None:
    password = site.authentik.create_token(access.USER, "app_password", "by-hand")
    done = site.certificate_authority.sign_with_step(access.key_of(variables), site.id_token(password))
    assert done.returncode == 0, done.stderr
    key, public = access.key_of(variables).read_bytes(), public_path(access.key_of(variables)).read_bytes()
    first = certificate_path(access.key_of(variables)).read_bytes()
    assert refresh(access.settings_of(variables), certificate="now").issued_with == "stored"
    assert (access.key_of(variables).read_bytes(), public_path(access.key_of(variables)).read_bytes()) == (key, public)
    assert certificate_path(access.key_of(variables)).read_bytes() != first
    assert access.logs_in(site, variables)


def test_a_due_certificate_is_renewed_before_it_ends(site: SimulatedSite, variables: dict[str, str]) -> None:
    access.age_certificate(site, variables)
    certificate = ensure_certificate(access.settings_of(variables))
    assert certificate
    assert (certificate.valid_before - datetime.now(UTC)).total_seconds() > 15 * 3600


def test_a_certificate_that_is_valid_and_refused_is_replaced_once(
    site: SimulatedSite, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, client_home: Path
) -> None:
    """As after the centre has changed the key of its authority, or revoked a certificate."""
    monkeypatch.setenv("HOME", str(client_home))
    settings = access.settings_of(variables)
    refresh(settings)
    key = access.key_of(variables)
    access.certify(key, 10 * 3600)
    young = certificate_path(key).read_bytes()
    with pytest.raises(AuthenticationError, match="does not trust its authority"):
        connect(settings, ensure_certificate)
    assert certificate_path(key).read_bytes() == young
    monkeypatch.setattr("dagster_sbatch.auth.renew.REFUSED_AGE", timedelta(seconds=30))
    os.utime(certificate_path(key), (0, 0))
    before, ready, connected = asked_for_tokens(site), threading.Barrier(6), list[bool]()

    def reach() -> None:
        ready.wait()
        with connect(settings, ensure_certificate) as connection:
            connected.append(connection.is_connected)

    threads = [threading.Thread(target=reach) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert connected == [True] * 6
    assert certificate_path(key).read_bytes() != young
    assert asked_for_tokens(site) == before + 1


def asked_for_tokens(site: SimulatedSite) -> int:
    return sum(each.path.startswith("/application/o/token/") for each in site.authentik.requests())


def test_a_plain_key_needs_nothing(site: SimulatedSite, without_secret: dict[str, str]) -> None:
    plain = {name: value for name, value in without_secret.items() if not name.startswith("ASC_")}
    settings = access.settings_of({**plain, "SLURM_EDGE_NODE_KEY_PATH": str(site.login.plain_key)})
    assert ensure_certificate(settings) is None
    assert check_health(settings).verdict == "ok"
    with pytest.raises(BootstrapError):  # no key either: there is nothing to log in with
        ensure_certificate(access.settings_of(plain))


def test_a_stored_app_password_that_was_deleted_is_replaced(variables: dict[str, str], site: SimulatedSite) -> None:
    settings = access.settings_of(variables)
    refresh(settings)
    stored = Credentials.read(settings.credentials_file)
    assert stored
    assert stored.app_password
    access.delete_token(settings, stored, stored.app_password.identifier)
    report = refresh(settings, certificate="now")
    assert (report.rotated_with, report.issued_with) == ("stored", "stored")


# Many at once, and for long

ENSURE = """\
import sys
from resources import PROJECT
from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.setting_files import load_settings
settings = PROJECT.load_settings()
sys.stdin.readline()
print(ensure_certificate(settings).valid_before)
"""


def test_processes_and_threads_at_once_ask_for_one_certificate(site: SimulatedSite, variables: dict[str, str]) -> None:
    processes = [access.start(ENSURE, variables) for _ in range(8)]
    settings = access.settings_of(variables)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(ensure_certificate(settings))) for _ in range(8)]
    for thread in threads:
        thread.start()
    said = access.release(processes)
    for thread in threads:
        thread.join()
    assert len(set(said)) == 1
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(access.made_here(site.authentik)) == 2
    assert asked_for_tokens(site) == 2  # one proves the new app password, one is for the certificate


def test_certificates_of_twenty_seconds_are_renewed_before_they_end(
    site: SimulatedSite, variables: dict[str, str], client_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice. One connection stays open all the time, others come and go; nobody is ever without a valid certificate."""
    monkeypatch.setenv("HOME", str(client_home))
    site.certificate_authority.set_validity("20s")
    settings = access.settings_of(variables)
    ends: set[datetime] = set()
    begun = time.monotonic()
    with connect(settings, ensure_certificate) as lasting:
        while len(ends) < 3:
            with connect(settings, ensure_certificate) as passing:
                assert passing.run("true", hide=True).ok
            asked = datetime.now(UTC)
            certificate = ensure_certificate(settings)
            assert certificate
            assert certificate.valid_before > asked
            ends.add(certificate.valid_before)
            answer = lasting.run("sleep 1; echo still here", hide=True)  # paces the loop, too
            assert answer.stdout.endswith("still here\n")
    assert time.monotonic() - begun > 20  # each is renewed after two thirds of its life
