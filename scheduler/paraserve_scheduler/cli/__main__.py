import sys

from paraserve_scheduler.cli.main import main

sys.exit(main())
