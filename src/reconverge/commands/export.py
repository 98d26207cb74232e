"""Write a run's model in a format for other tools, with an example and its logits; or check an export."""

import argparse
from pathlib import Path

from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
from reconverge.config import rules
from reconverge.run.reader import opened

FORMS = ("timm", "safetensors", "onnx", "pt2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN",
        help="runs/NAME or one of its checkpoints; with --check: the folder of an export",
    )
    parser.add_argument(
        "--to",
        choices=FORMS,
        help="the format; timm: a folder for timm.create_model; pt2: a file for torch.export.load",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check an export: the hashes of its files, and the logits of the example",
    )
    parser.add_argument(
        "--weights", choices=("raw", "ema"), help="default: ema if the run keeps EMA weights, else raw"
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="export the checkpoint with the best top-1 of these weights instead of the newest one",
    )
    parser.add_argument(
        "--average",
        type=int,
        default=1,
        metavar="N",
        help="export the mean of the weights of the newest N checkpoints (default: 1)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the export (default: RUN/export-FORMAT)"
    )
    parser.add_argument(
        "--license", default="other", metavar="ID", help="license in the model card (default: other)"
    )


def main(arguments: argparse.Namespace) -> int:
    if bool(arguments.to) == arguments.check:
        raise Stop(
            Exit.USAGE,
            "both --to and --check" if arguments.check else "neither --to nor --check",
            "exactly one of --to and --check",
            f"--to {FORMS[0]} to write an export, or --check to check one",
        )
    if arguments.average < 1 or (arguments.best and arguments.average > 1):
        raise Stop(
            Exit.USAGE,
            f"--average {arguments.average}{' --best' * arguments.best}",
            "--average 1 or more, and without --best, which is a single checkpoint",
            "--average 5, or --best alone",
        )
    if arguments.check:
        from reconverge.evaluation.export import check

        say(f"{arguments.path}: all files are unchanged; logits of the example: {check(arguments.path)}")
        return Exit.DONE

    of = opened(arguments.path)
    rules.refuse_segmenters(of.cfg.task, "reconverge export")
    folder = arguments.out or of.folder / f"export-{arguments.to}"
    if folder.exists() and any(folder.iterdir()) and not (folder / "export.json").exists():
        raise Stop(
            Exit.USAGE,
            f"{folder} contains files that are not an export",
            "a new folder, an empty folder, or the folder of an earlier export",
            "choose another --out",
        )

    from reconverge.evaluation import export

    weights = export.choose(arguments.path, of, arguments.weights, arguments.best, arguments.average)
    about = export.export(of, weights, arguments.to, folder, arguments.license)
    top1 = "not evaluated" if about["top1"] is None else f"top-1 {about['top1']:.2f} %"
    say(f"{folder}: {about['weights']} weights after step {', '.join(map(str, about['steps']))}, {top1}")
    say(f"logits of the example: {export.check(folder)}")
    return Exit.DONE
