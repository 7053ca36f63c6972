"""The errors of the simulated site."""


class SiteError(RuntimeError):
    """A part of the site did not start, stop or answer. The message names the part and its log."""


class RequirementsError(SiteError):
    """This machine lacks something that the site needs; the message names it in one line."""


class NotInstalledError(RequirementsError):
    """The machine lacks something that `up --install` installs."""
