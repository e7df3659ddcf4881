"""Runs the command line as `python -m paraserve_scheduler.cli`."""

import sys

from paraserve_scheduler.cli.main import main

sys.exit(main())
