"""The command line ``tinygrad-lstm`` (also ``python -m tinygrad_lstm``).

Exit status: 0 it worked; 1 it failed, with a one-line reason on standard error; 2 wrong arguments,
likewise; 130 and 143 stopped by Ctrl-C and by SIGTERM, as shells count them (128 + signal).

A command is a module with ``NAME``, ``HELP``, ``add_arguments(parser)`` and ``run(args) -> status``;
:data:`COMMANDS` lists them.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from tinygrad_lstm._version import __version__
from tinygrad_lstm.cli import bench, cache, evaluate, export, gradcheck, inspect, sample, train
from tinygrad_lstm.cli.options import NAME, UsageError, program
from tinygrad_lstm.errors import Error
from tinygrad_lstm.hints import did_you_mean

__all__ = ["COMMANDS", "main"]

COMMANDS = (train, sample, evaluate, export, bench, gradcheck, inspect, cache)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line in place of argparse's usage block; a misspelt choice gets the one that is most like it."""
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong is not None:
            message += did_you_mean(wrong[1], re.findall(r"[\w.-]+", wrong[2]))
        self.exit(2, f"{self.prog}: {message} (see {program()}{self.prog.removeprefix(NAME)} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Parameters
    ----------
    argv : list of str, optional
        The arguments without the program's name; ``sys.argv[1:]`` without it.
    """
    parser = _Parser(
        prog=NAME,
        description="Recurrent models on the CPU, with the autodiff in plain sight.",
        epilog="Exit status: 0 worked, 1 failed, 2 wrong arguments, 130 stopped by Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        sub = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    name = parser.prog
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A text may have characters that the terminal's encoding has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args, unknown = parser.parse_known_args(argv)
        name = f"{parser.prog} {args.command}"
        if unknown:
            sub = commands.choices[args.command]
            options = re.findall(r"--[\w-]+", sub.format_help())
            likely = [did_you_mean(word.partition("=")[0], options) for word in unknown if word.startswith("--")]
            sub.error(f"unrecognized arguments: {' '.join(unknown)}{next(filter(None, likely), '')}")
        status = int(args.run(args))
        # A closed pipe shows here, not in the interpreter's last moments.
        sys.stdout.flush()
        return status
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0
    except UsageError as error:
        return _fail(name, str(error), 2)
    except KeyboardInterrupt:
        return _fail(name, "stopped by Ctrl-C", 130)
    except BrokenPipeError:
        # The reader (head, less) has had enough.  Standard output must not be flushed again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _fail(name, "not enough memory; try a smaller model, batch or sequence length", 1)
    except Error as error:
        return _fail(name, str(error), 1)
    except OSError as error:
        reason = error.strerror or str(error)
        return _fail(name, f"{error.filename}: {reason}" if error.filename is not None else reason, 1)


def _fail(name: str, message: str, status: int) -> int:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return status
