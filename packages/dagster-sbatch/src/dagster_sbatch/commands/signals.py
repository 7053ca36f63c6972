"""Ctrl-C and SIGTERM in commands that change files: one interrupt, and a clean-up that is not interrupted itself."""

import signal

STOPS = (signal.SIGINT, signal.SIGTERM)


def interrupt_once() -> None:
    """From now on, the first of STOPS raises KeyboardInterrupt with its number; later ones are ignored."""
    for number in STOPS:
        signal.signal(number, _interrupt)


def ignore_interrupts() -> None:
    """From now on, ignore STOPS: what follows is short, and has to be done whole."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, _: object) -> None:
    ignore_interrupts()
    raise KeyboardInterrupt(number)
