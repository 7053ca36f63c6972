"""What can go wrong with access to the supercomputer. The texts are meant for users, and hold no secret."""


class AccessError(Exception):
    """There is no access, or it could not be renewed. Of no other class: a setting or an answer is wrong."""

    temporary = False  # a later retry may succeed without any change


class BootstrapError(AccessError):
    """There is nothing to get a certificate with: no stored credentials, no token, no app password."""


class RejectedError(AccessError):
    """A server does not accept a credential, and will not later: a person has to act."""


class UnsafeFileError(AccessError):
    """A file for access cannot be used: others can read it, or could have put it there, or reading it fails."""


class ClockError(AccessError):
    """The clocks of two machines differ by more than certificates and tokens tolerate."""

    temporary = True


class UnavailableError(AccessError):
    """A server does not answer, or says that it cannot now; or another process has the lock for too long."""

    temporary = True
