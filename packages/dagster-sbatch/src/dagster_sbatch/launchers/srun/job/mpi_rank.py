"""Run the workload of a rank with mpi4py, and record its failure.

usage: mpi_rank.py FAILURE PROGRAM ARGUMENTS...

If the workload raises, mpi4py ends all ranks (MPI_Abort). That kills the process that reads this rank's output, too,
which may not have read why: so the failure is recorded here.
"""

import sys
import traceback
from pathlib import Path

from mpi4py import run

from one_rank import record_failure


def main() -> None:
    """Run the program as `python -m mpi4py` does."""
    failure, *words = sys.argv[1:]
    try:
        run.run_command_line(words)
    except SystemExit as exit_:
        run.set_abort_status(exit_)
        code = exit_.code if isinstance(exit_.code, int) else 1
        if exit_.code not in (None, 0):
            record_failure(Path(failure), code, [] if code == exit_.code else str(exit_.code).splitlines())
        raise
    except BaseException:
        run.set_abort_status(1)
        record_failure(Path(failure), 1, traceback.format_exc().splitlines())
        raise


if __name__ == "__main__":
    main()
