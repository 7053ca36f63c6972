"""Run the command `python -m slurm_in_a_box`."""

import sys

from .command_line import main

sys.exit(main())
