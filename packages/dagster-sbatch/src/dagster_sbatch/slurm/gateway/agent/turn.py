"""One call of the user at a time compares its cost with what is left, and submits; the next one sees its job."""

import os
import threading
import time

from .disk import lock, own

WAIT = 30.0  # seconds for the calls before this one; then it is compared without them
LONGEST = 60.0  # seconds between the answer and the submission, after which the next call waits no more
EVERY = 0.2


class Turn:
    """The turn of this agent's client: the lock of a file beside the runs, which the agents on all machines share."""

    def __init__(self):
        self.file = None

    def take(self, folder):
        """Wait for the turn, for a while; `folder`: of the runs. Without locks or a place for the file, do without."""
        self.end()
        path, until = os.path.join(folder, ".budget.lock"), time.monotonic() + WAIT
        try:
            own(folder)
            file = open(path, "w")
        except OSError:
            return
        while True:
            try:
                lock(file, path, wait=False)
                break
            except OSError as error:
                if not isinstance(error, BlockingIOError) or time.monotonic() > until:
                    file.close()
                    return
            time.sleep(EVERY)
        self.file = file
        limit = threading.Timer(LONGEST, file.close)
        limit.daemon = True
        limit.start()

    def end(self):
        """Let the next call have its turn."""
        if self.file:
            self.file.close()
