"""Write a run's model as other tools load it, with an example and its logits; or check such a folder."""

import argparse
from pathlib import Path

from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
from reconverge.run.reader import opened

FORMS = ("timm", "safetensors", "onnx", "pt2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN",
        help="runs/NAME or a checkpoint of it; with --check a folder that was exported",
    )
    parser.add_argument("--to", choices=FORMS, help="timm: a folder for timm.create_model; pt2: torch.export")
    parser.add_argument(
        "--check",
        action="store_true",
        help="verify an export: its files, and its logits by the tool that loads it",
    )
    parser.add_argument(
        "--weights", choices=("raw", "ema"), help="default: the EMA's where the run keeps one"
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="of the checkpoint with the best top-1 of these weights, in place of the newest",
    )
    parser.add_argument(
        "--average", type=int, default=1, metavar="N", help="the mean of the newest N checkpoints"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/export-FORM")
    parser.add_argument(
        "--license", default="other", metavar="ID", help="for the model card (default: other)"
    )


def main(arguments: argparse.Namespace) -> int:
    if bool(arguments.to) == arguments.check:
        raise Stop(
            Exit.USAGE,
            "both --to and --check" if arguments.check else "neither --to nor --check",
            "one of them",
            f"--to {FORMS[0]}",
        )
    if arguments.average < 1 or (arguments.best and arguments.average > 1):
        raise Stop(
            Exit.USAGE,
            f"--average {arguments.average}{' --best' * arguments.best}",
            "1 or more; of --best there is one",
            "--average 5",
        )
    if arguments.check:
        from reconverge.evaluation.export import check

        say(f"{arguments.path}: every file as it was written; logits of the example: {check(arguments.path)}")
        return Exit.DONE

    of = opened(arguments.path)
    folder = arguments.out or of.folder / f"export-{arguments.to}"
    if folder.exists() and any(folder.iterdir()) and not (folder / "export.json").exists():
        raise Stop(
            Exit.USAGE,
            f"{folder} holds other files",
            "a new folder, an empty one, or one of an earlier export",
            "another --out",
        )

    from reconverge.evaluation import export

    weights = export.choose(arguments.path, of, arguments.weights, arguments.best, arguments.average)
    about = export.export(of, weights, arguments.to, folder, arguments.license)
    top1 = "not evaluated" if about["top1"] is None else f"top-1 {about['top1']:.2f} %"
    say(f"{folder}: {about['weights']} weights after step {', '.join(map(str, about['steps']))}, {top1}")
    say(f"logits of the example: {export.check(folder)}")
    return Exit.DONE
