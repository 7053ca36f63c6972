"""step CA: an SSH user certificate in exchange for an OIDC token, by HTTP or with the `step` program.

Source: https://smallstep.com/docs/step-ca and its API `/root/{sha}`, `/1.0/ssh/sign`.
"""

import base64
import hashlib
import os
import re
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from resources.auth import clock
from resources.auth.authentik import OidcToken
from resources.auth.errors import ClockError, MisconfiguredError, RefusedError, UnavailableError
from resources.auth.http import Http
from resources.settings import Settings

CLOCK_TOLERANCE = timedelta(seconds=30)
STEP_SECONDS = 30.0
_STEP_OPTIONS = ("--sign", "--force", "--no-password", "--insecure")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

Issue = Callable[[Settings, Http, str, OidcToken], str]
"""Settings, the refresh's calls, a public key line and a fresh token; gives the certificate's line."""


def issuer(settings: Settings) -> Issue:
    """Return how certificates are requested, by ASC_STEP_CLIENT."""
    return _issue_with_step if settings.step_client == "step" else _issue_by_http


def _issue_by_http(settings: Settings, http: Http, public_key: str, token: OidcToken) -> str:
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody yet
    trust.load_verify_locations(cadata=_fetch_root(settings, http))
    kind, blob = public_key.split()[:2]
    # No principals: the CA derives them from the token's email, and refuses a request for others.
    body = {"publicKey": blob, "ott": token.value, "certType": "user", "keyID": token.email}
    answer = http.call("POST", f"{_base(settings)}/1.0/ssh/sign", json_body=body, trust=trust, tries=1)
    if answer.status == 401:
        _compare_clocks(token, answer.date)
        raise RefusedError(
            f"the certificate authority refused the OIDC token ({answer.reason}). {_refused_token(settings, token)}"
        )
    if answer.status == 403:
        raise RefusedError(
            f"the certificate authority refused a certificate for {token.email} ({answer.reason}). Ask the centre "
            "with this text"
        )
    if answer.status != 201:
        raise MisconfiguredError(
            f"the certificate authority did not certify the {kind} key ({answer.reason}). If the key is the cause, "
            f"move {settings.edge_node_key_path} away, and a new one is made; else ask the centre with this text"
        )
    try:
        certificate = base64.b64decode(answer.data["crt"], validate=True)
    except (KeyError, TypeError, ValueError):
        raise MisconfiguredError(
            f"{_base(settings)} answered without a certificate. Check ASC_STEP_CA_URL, or ask the centre"
        ) from None
    length = int.from_bytes(certificate[:4], "big")
    return f"{certificate[4 : 4 + length].decode(errors='replace')} {answer.data['crt']} {token.email}"


def _issue_with_step(settings: Settings, http: Http, public_key: str, token: OidcToken) -> str:
    step = shutil.which("step")
    if step is None:
        raise MisconfiguredError("ASC_STEP_CLIENT=step, but there is no `step` on PATH; unset it to do without")
    with tempfile.TemporaryDirectory(prefix="step-") as made:
        folder = Path(made)
        root, public = folder / "root.pem", folder / "id.pub"
        root.write_text(_fetch_root(settings, http))
        public.write_text(public_key + "\n")
        place = ["--ca-url", _base(settings), "--root", str(root)]
        environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": made, "STEPPATH": made}
        try:
            done = subprocess.run(
                [step, "ssh", "certificate", token.email, str(public), *_STEP_OPTIONS, *place],
                env={**environment, "STEP_TOKEN": token.value, "STEPDEBUG": "1"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=max(1.0, min(STEP_SECONDS, http.remaining())),
                check=False,
                start_new_session=True,  # without a terminal it fails where it would ask
            )
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"`step ssh certificate` took longer than {STEP_SECONDS:.0f} s") from None
        if done.returncode == 0:
            return (folder / "id-cert.pub").read_text().strip()
        said = _COLOUR.sub("", done.stderr).replace(token.value, "(token)").strip()[:500]
    health = http.call("GET", f"{_base(settings)}/health", trust=_unverified())
    _compare_clocks(token, health.date)
    raise RefusedError(
        f"`step ssh certificate` ended with {done.returncode}: {said}. {_refused_token(settings, token)}"
    )


def _refused_token(settings: Settings, token: OidcToken) -> str:
    """Say what the authority compares with its own configuration."""
    return (
        f"The token's issuer (iss) is {token.issuer}, its audience (aud) {token.audience}, and the authority knows one "
        f"of each. authentik takes the issuer from the host name in ASC_OIDC_TOKEN_URL={settings.oidc_token_url}, the "
        "audience is ASC_OIDC_CLIENT_ID: compare both with the centre's documentation"
    )


def _fetch_root(settings: Settings, http: Http) -> str:
    """The CA's root certificate, as PEM; trusted since its SHA-256 is the pinned fingerprint."""
    fingerprint = (settings.step_fingerprint or "").lower()
    answer = http.call("GET", f"{_base(settings)}/root/{fingerprint}", trust=_unverified())
    try:
        pem = str(answer.data["ca"])
        found = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
    except (KeyError, TypeError, ValueError):
        raise MisconfiguredError(
            f"{_base(settings)} does not know a root certificate with ASC_STEP_FINGERPRINT={fingerprint} "
            f"({answer.reason}): is it the right certificate authority? Check both variables"
        ) from None
    if found != fingerprint:
        raise MisconfiguredError(
            f"{_base(settings)} sent a root certificate with the fingerprint {found}, not ASC_STEP_FINGERPRINT="
            f"{fingerprint}: it is another one, or somebody is between you and it. Ask the centre before changing it"
        )
    return pem


def _unverified() -> ssl.SSLContext:
    """Return a context for answers that are checked otherwise, or of which nothing depends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _base(settings: Settings) -> str:
    return (settings.step_ca_url or "").rstrip("/")


def _compare_clocks(token: OidcToken, authority: datetime | None) -> None:
    """Raise ClockError if the token is not valid by the authority's clock."""
    if authority is None or token.issued - CLOCK_TOLERANCE <= authority < token.expires:
        return
    here = clock.now()
    raise ClockError(
        f"the clocks differ: authentik issued the token at {clock.written(token.issued)}, while the certificate "
        f"authority has {clock.written(authority)} and this machine {clock.written(here)}. It is tried again; "
        "tell the centre if it lasts, or set this machine's clock if it is the one that differs"
    )
