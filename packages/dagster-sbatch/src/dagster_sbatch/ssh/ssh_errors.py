"""Errors of SSH connections; each kind needs another reaction."""


class SshError(Exception):
    """There is no connection. The text is meant for the user; it holds no secret."""


class HostKeyError(SshError):
    """The machine that answers is not trusted. A retry does not help."""


class AuthenticationError(SshError):
    """The private key cannot be used, or the server does not accept it or its certificate."""


class UnreachableError(SshError):
    """No answer, or the connection was lost. A retry may help."""
