"""The two ways in which the simulated site fails."""


class SiteError(RuntimeError):
    """Something of the site did not start, stop or answer; the message says what, and which log to read."""


class RequirementsError(SiteError):
    """This machine cannot run the site as it is; the message says in one line what it needs."""
