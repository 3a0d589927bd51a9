"""A rank of a training script, forked from a process that has imported everything: it starts in a second."""

import os
import runpy
import signal
import sys


def main(script, arguments, environment, output):
    """Runs `script` as `python script arguments` would, with stdout and stderr appended to a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal, wherever the tests run
    os.environ.update(environment)
    descriptor = os.open(output, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
