"""The entry point of the command line: finds the command, --debug and --json, and sets the exit code.

Exit codes: 0 done; 2 the input was wrong (one line says how); 3 the cluster failed, and the same command, given
again, continues; 130 interrupted; 1 a defect of moe_evo. Imports nothing slow.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches

from moe_evo.cli.actions import ACTIONS
from moe_evo.cli.output import write_any_character
from moe_evo.errors import ClusterError, ConfigError, MoeEvoError
from moe_evo.shown import line_of, shown

_USAGE = "moe-evo COMMAND ...  (--help after each command tells its options)"
_DESCRIPTION = """Find which experts of a Mixture-of-Experts model a task needs; export the smaller model.

  moe-evo search                              try it on the embedded model and task
  moe-evo search CONFIG.yaml --search.num_kept 4
  moe-evo sweep CONFIG.yaml --sweep.num_kept 2,4,6 --sweep.seeds 0,1,2
  moe-evo plan CONFIG.yaml                    memory, gangs and time of a search, and what is wrong with it
  moe-evo tasks check CONFIG.yaml             what tasks hold, and what gain they can tell from chance
  moe-evo tasks preview CONFIG.yaml           examples as the model reads them, and what it answers
  moe-evo show RUN                            what a run found, as table and picture
  moe-evo compare RUN...                      the tables of several runs as one, also as CSV or JSON
  moe-evo report RUN... --to report.html      everything about runs on one interactive page
  moe-evo evaluate RUN --split test           score its winner, or any --genome, on any split
  moe-evo export RUN --to DIR                 a checkpoint that stock transformers loads
  moe-evo prune --method reap --num_kept 4 --to DIR   without a search, by a one-shot criterion
  moe-evo recover CHECKPOINT|RUN --to DIR     what pruning broke, learned from the full model
  moe-evo compress CHECKPOINT --method moe_pruner --to DIR   sparse or low-rank experts
  moe-evo carve MODEL --to DIR                an MoE of a dense model, to be recovered, searched and pruned
  moe-evo criteria                            the one-shot criteria
  moe-evo wandb-replay RUN                    write a run of W&B from the journal of a search
  moe-evo doctor                              versions, GPU, memory, and whether what a run relies on holds here
"""

_KEPT = {
    "search": "; all finished evaluations are kept, the same command goes on",
    "sweep": "; all finished evaluations are kept, the same command goes on",
    "recover": "; what was learned until the last check is kept, the same command goes on",
}
"""What is told of a command that was interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if argv is None:  # run as a program: SIGTERM, as sent by `ray job stop`, is handled like Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    write_any_character()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _take(words, "--debug")
    as_json = _take(words, "--json")
    try:
        return _dispatch(words, as_json=as_json)
    except MoeEvoError as error:
        return _fail(f"error: {error}", 3 if isinstance(error, ClusterError) else 2, debug=debug)
    except KeyboardInterrupt:
        return _fail(f"interrupted{_KEPT.get(words[0], '') if words else ''}", 130, debug=debug)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is still buffered must not raise at exit
        return 0
    except OSError as error:  # of a file that the command names; where more is known, the error above is raised
        where = error.filename2 or error.filename
        message = f"error: {where or 'a file'}: {error.strerror or error}; check the path, its permissions and its disk"
        return _fail(message, 2, debug=debug)
    except Exception as error:  # noqa: BLE001 - the border of the process: a defect still ends in one line
        message = f"unexpected {type(error).__name__}: {error}; run again with --debug for the traceback"
        return _fail(message, 1, debug=debug)


def _take(words: list[str], flag: str) -> bool:
    """Remove a flag from the words, with the true or false that may follow it, and return whether it is set."""
    given = False
    while flag in words:
        first = words.index(flag)
        value = words[first + 1 : first + 2]
        given = value != ["false"]
        del words[first : first + (2 if value in (["true"], ["false"]) else 1)]
    return given


def _dispatch(words: list[str], *, as_json: bool) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {_USAGE}\n\n{_DESCRIPTION}\nWith every command: --json prints the result as JSON, --debug shows "
              "the traceback of an error.")  # fmt: skip
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("moe_evo"))
        return 0
    if hidden := next((word for word in words if "\x00" in word), None):
        raise ConfigError(f"got {shown(hidden)}, expected words without NUL")
    if words[0] not in ACTIONS:
        is_option = words[0].startswith("-")
        got = f"option {words[0]!r} before any command" if is_option else f"command {words[0]!r}"
        near = get_close_matches(words[0], ["--help", "--version"] if is_option else ACTIONS, n=1)
        advice = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown {got}, expected one of: {', '.join(ACTIONS)}{advice}")
    from moe_evo.cli.parsers import PARSERS

    parser = PARSERS[words[0]]()
    if "-h" in words or "--help" in words:
        parser.print_help()
        return 0
    ACTIONS[words[0]](parser, words[1:], as_json=as_json)
    return 0


def _fail(message: str, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"moe-evo: {line_of(message)}", file=sys.stderr)
    return code
