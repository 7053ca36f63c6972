"""The environment of child processes: what an allow-list names, so that no secret of Dagster gets there."""

import os

_ALWAYS = frozenset(
    """
    PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TMPDIR TERM LD_LIBRARY_PATH DYLD_LIBRARY_PATH
    XDG_CACHE_HOME XDG_CONFIG_HOME SSL_CERT_FILE SSL_CERT_DIR SUDO_UID
    """.split()
)
NETWORK = tuple(
    """
    HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy
    REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
    """.split()
)
"""For what fetches something; proxies may have passwords in them. The last two are pip's."""


def child_environment(*more: str, **values: str) -> "dict[str, str]":
    """Return the variables for a child process.

    `more`: names that this child may have, too; one that ends with `_` stands for all that begin so. `values`: further
    variables.
    """
    prefixes = ("LC_", *(name for name in more if name.endswith("_")))
    names = _ALWAYS.union(more)
    kept = {name: value for name, value in os.environ.items() if name in names or name.startswith(prefixes)}
    return {**kept, **values}
