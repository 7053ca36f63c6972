"""step CA: exchange an OIDC token for an SSH user certificate.

Source: https://smallstep.com/docs/step-ca and its API `/root/{sha}`, `/1.0/ssh/sign`.
"""

import base64
import hashlib
import ssl
from datetime import datetime, timedelta

from dagster_sbatch import clock
from dagster_sbatch.auth.access_errors import AccessError, ClockError, RejectedError
from dagster_sbatch.auth.authentik import OidcToken
from dagster_sbatch.auth.http import Http
from dagster_sbatch.auth.keys import type_of
from dagster_sbatch.settings import Settings

CLOCK_TOLERANCE = timedelta(seconds=30)


def issue_certificate(settings: Settings, http: Http, public_key: str, token: OidcToken) -> str:
    """Request a certificate for a public key; return it as OpenSSH's line `<type> <base64> <comment>`.

    `token`: a fresh one, since the authority accepts each token once.
    Raises UnavailableError: the authority does not answer.
    Raises ClockError: the authority's clock differs from authentik's.
    Raises RejectedError: the authority does not accept the token, or issues no certificate to this user.
    Raises AccessError: it is another authority than ASC_STEP_FINGERPRINT says, or it does not certify this key.
    """
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody yet
    trust.load_verify_locations(cadata=_fetch_root(settings, http))
    kind, blob = public_key.split()[:2]
    # No principals: the CA derives them from the token's email, and refuses a request for others.
    body = {"publicKey": blob, "ott": token.value, "certType": "user", "keyID": token.email}
    answer = http.call("POST", f"{_base(settings)}/1.0/ssh/sign", json=body, trust=trust, tries=1)
    if answer.status == 401:
        _compare_clocks(token, answer.date)
        raise RejectedError(
            f"the certificate authority refused the OIDC token ({answer.reason}). It accepts one issuer and one "
            f"audience. The token's issuer (iss) is {token.issuer}; authentik takes it from the host name in "
            f"ASC_OIDC_TOKEN_URL={settings.oidc_token_url}. Its audience (aud) is {token.audience}, which is "
            "ASC_OIDC_CLIENT_ID. Compare both settings with the centre's documentation"
        )
    if answer.status == 403:
        raise RejectedError(
            f"the certificate authority refused a certificate for {token.email} ({answer.reason}). Ask the centre "
            "with this text"
        )
    if answer.status != 201:
        raise AccessError(
            f"the certificate authority did not certify the {kind} key ({answer.reason}). If the key is the cause, "
            f"move {settings.edge_node_key_path} away, and a new one is made; else ask the centre with this text"
        )
    try:
        certificate = base64.b64decode(answer.data["crt"], validate=True)
    except (KeyError, TypeError, ValueError):
        raise AccessError(
            f"{_base(settings)} answered without a certificate. Check ASC_STEP_CA_URL, or ask the centre"
        ) from None
    return f"{type_of(certificate)} {answer.data['crt']} {token.email}"


def _fetch_root(settings: Settings, http: Http) -> bytes:
    """Return the CA's root certificate, as DER: the bytes of which the SHA-256 is ASC_STEP_FINGERPRINT, and no more."""
    fingerprint = (settings.step_fingerprint or "").lower()
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # for an answer that is checked by its fingerprint
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    answer = http.call("GET", f"{_base(settings)}/root/{fingerprint}", trust=anybody)
    try:
        root = ssl.PEM_cert_to_DER_cert(str(answer.data["ca"]))
    except (KeyError, TypeError, ValueError):
        raise AccessError(
            f"{_base(settings)} does not know a root certificate with ASC_STEP_FINGERPRINT={fingerprint} "
            f"({answer.reason}). Check ASC_STEP_CA_URL and ASC_STEP_FINGERPRINT, or ask the centre with this text"
        ) from None
    found = hashlib.sha256(root).hexdigest()
    if found != fingerprint:
        raise AccessError(
            f"{_base(settings)} sent a root certificate with the fingerprint {found}, not ASC_STEP_FINGERPRINT="
            f"{fingerprint}: another authority, or somebody intercepts the connection. Ask the centre before a change"
        )
    return root


def _base(settings: Settings) -> str:
    return (settings.step_ca_url or "").rstrip("/")


def _compare_clocks(token: OidcToken, authority: datetime | None) -> None:
    """Raise ClockError if the token is not valid by the authority's clock."""
    if authority is None or token.issued - CLOCK_TOLERANCE <= authority < token.expires:
        return
    here = clock.now()
    raise ClockError(
        f"the clocks differ: authentik issued the token at {clock.written(token.issued)}, while the certificate "
        f"authority has {clock.written(authority)} and this machine {clock.written(here)}. The refresh is "
        "retried. Tell the centre if this repeats, or set this machine's clock if it is the one that differs"
    )
