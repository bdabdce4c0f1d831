"""What every command needs: files, working directories, randomness, flags, jobs in parallel, tables, figures.

Programs import it before all else, so that an interruption while other modules are imported ends them in one line.
"""

import sys


def _without_traceback(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt) and not hasattr(sys, "ps1"):  # ps1: somebody is at a prompt
        print("stopped; the same command resumes", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _without_traceback
