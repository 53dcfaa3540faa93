"""`python -m moe_evo` is the command `moe-evo`."""

import sys

from moe_evo.cli import main

sys.exit(main())
