"""What can go wrong with an SSH connection: each kind asks for something else to be done."""


class SshError(Exception):
    """There is no connection. The text is meant for the user; it holds no secret."""


class HostKeyError(SshError):
    """The machine that answers is not known to be the one that was meant. Trying again is no help."""


class AuthenticationError(SshError):
    """The private key cannot be used, or the login node does not take it or its certificate."""


class UnreachableError(SshError):
    """No answer, or the connection was lost: nothing is known about the other side, and trying again can help."""
