"""reconverge COMMAND: one file a command, thin over the parts."""

import argparse
import sys
from importlib import import_module

from reconverge.errors import exit_code

COMMANDS = {
    "models": "the table of models: counted and published size, accuracy, recipes",
    "plan": "what a training will be, without training",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="reconverge", description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, help in COMMANDS.items():
        command = import_module(f"reconverge.commands.{name}")  # light: what takes seconds to import, a command imports as it runs
        command.add_arguments(subparsers.add_parser(name, help=help, description=command.__doc__))
    arguments, rest = parser.parse_known_args()
    if not hasattr(arguments, "overrides") or any("=" not in argument or argument.startswith("-") for argument in rest):
        arguments = parser.parse_args()  # refuses the rest
    else:
        arguments.overrides += rest  # key=value after an option: argparse takes one block of them
    sys.exit(exit_code(lambda: import_module(f"reconverge.commands.{arguments.command}").run(arguments)))
