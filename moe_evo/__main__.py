"""`python -m moe_evo` is the command `moe-evo`: a process of our own, in which libraries keep silent."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from moe_evo.cli.main import main


def run() -> int:
    """The command; what libraries warn of is for developers, who see it with --debug or with PYTHONWARNINGS."""
    if not sys.warnoptions and "--debug" not in sys.argv:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.raiseExceptions = False  # such as of a log file that cannot hold a character in this locale
    return main()


if __name__ == "__main__":
    sys.exit(run())
