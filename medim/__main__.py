"""`python -m medim COMMAND ...`: the `medim` command, as launchers of several processes start it."""

import sys

from medim.cli import main

sys.exit(main())
