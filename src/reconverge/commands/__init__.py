"""reconverge COMMAND: one file for each command; each calls the other parts of the package."""

import argparse
import sys
from importlib import import_module

from reconverge.base import environment
from reconverge.base.errors import exit_code

COMMANDS = {
    "prepare": "convert downloaded archives or class folders into verified shards",
    "check": "read every byte of prepared shards and list each fault",
    "verify": "train some steps of a run again and compare them bit by bit",
    "selftest": "test reproducibility (R1 to R4) on this machine, in a few minutes",
    "batch": "list the images of one step of a run, with their random keys",
    "bench": "measure the speed of the data loader or of a model alone",
    "report": "write one HTML page about one or several runs: results, curves, predictions, environment",
    "export": "write a run's model for timm, ONNX, torch.export or as safetensors",
    "plan": "print the schedule, cost and memory of a training without training",
    "models": "print the table of models: parameters, multiply-adds, published accuracy, recipes",
}


def main() -> None:
    arguments = parsed(sys.argv[1:])
    sys.exit(exit_code(lambda: import_module(f"reconverge.commands.{arguments.command}").main(arguments)))


def parsed(given: list[str]) -> argparse.Namespace:
    """The parsed command line. Ends the process (exit 2) if argparse rejects it."""
    parser = argparse.ArgumentParser(
        prog="reconverge",
        description="Commands around training. To train: python train.py; to evaluate: python eval.py.",
    )
    parser.add_argument("--version", action="version", version=environment.in_words())
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, help in COMMANDS.items():
        # Importing a command is fast: it imports slow libraries only when it runs.
        command = import_module(f"reconverge.commands.{name}")
        command.add_arguments(subparsers.add_parser(name, help=help, description=command.__doc__))
    arguments, rest = parser.parse_known_args(given)
    # key=value may stand before and after an option, but argparse accepts only one block of them.
    if hasattr(arguments, "overrides"):
        arguments.overrides += [argument for argument in rest if not argument.startswith("-")]
        rest = [argument for argument in rest if argument.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments
