"""What stops commands that change files: one interrupt, and a clean-up that is not interrupted itself.

scripts/demo of each copy imports it.
"""

import signal

HANGUP = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
STOPS = (signal.SIGINT, signal.SIGTERM, *HANGUP)
"""Ctrl-C, `kill`, and the end of the terminal, unless `nohup` has started this process."""


def interrupt_once() -> None:
    """Let the first of STOPS raise KeyboardInterrupt with its number, and ignore later ones, from now on."""
    for number in STOPS:
        signal.signal(number, _interrupt)


def ignore_interrupts() -> None:
    """Ignore STOPS from now on: what follows is short, and must not be done by half."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, _: object) -> None:
    ignore_interrupts()
    raise KeyboardInterrupt(number)
