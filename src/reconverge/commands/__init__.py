"""reconverge COMMAND: one file a command, thin over the parts."""

import argparse
import sys
from importlib import import_module

from reconverge.base import environment
from reconverge.base.errors import exit_code

COMMANDS = {
    "prepare": "from what people download to verified shards",
    "check": "read every byte of prepared shards, name each fault",
    "verify": "train some steps of a run again, and compare them bit by bit",
    "selftest": "try the promises on this machine, in a few minutes",
    "batch": "the images of one step of a run, with their keys",
    "bench": "measure the loader, or a model, by itself",
    "report": "one page of one or several runs: results, curves, predictions, environment",
    "export": "a run's model as timm, ONNX and torch.export load it",
    "plan": "what a training will be, without training",
    "models": "the table of models: counted and published size, accuracy, recipes",
}


def main() -> None:
    arguments = parsed(sys.argv[1:])
    sys.exit(exit_code(lambda: import_module(f"reconverge.commands.{arguments.command}").main(arguments)))


def parsed(given: list[str]) -> argparse.Namespace:
    """What a command line says. Ends the process (exit 2) where argparse does not understand it."""
    parser = argparse.ArgumentParser(
        prog="reconverge",
        description="Everything but training and evaluating, which are python train.py and python eval.py.",
    )
    parser.add_argument("--version", action="version", version=environment.in_words())
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, help in COMMANDS.items():
        command = import_module(
            f"reconverge.commands.{name}"
        )  # light: what takes seconds to import, a command imports as it runs
        command.add_arguments(subparsers.add_parser(name, help=help, description=command.__doc__))
    arguments, rest = parser.parse_known_args(given)
    if hasattr(
        arguments, "overrides"
    ):  # key=value may stand on both sides of an option; argparse takes one block of them
        arguments.overrides += [argument for argument in rest if not argument.startswith("-")]
        rest = [argument for argument in rest if argument.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments
