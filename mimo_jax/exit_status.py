"""How a command ends: its status, and one clear line on standard error where it failed."""

import os
import sys
from collections.abc import Callable


def exit_status(work: Callable[[], int], debug: bool = False) -> int:
    """The status that `work` gives; 2 for what the person can mend, 1 for a fault of ours.

    Args:
        work: All of the command.
        debug: Raise what failed rather than print it.
    """
    try:
        return work()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        expected = isinstance(error, ValueError | OSError | NotImplementedError | MemoryError)
        print(f"error: {error}" if expected else f"internal error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2 if expected else 1
