"""A run's folder, while a process trains in it: locked, held to what it began with, and told how it ended.
Imports no torch.

runs/<name>/ holds config.yaml, environment.json, classes.txt, metrics.jsonl, record.jsonl, status.json,
pictures, checkpoints/ and, while a process trains, its lock. Rank 0 writes them; other ranks write nothing
but, when they fail, errors/rank-N.txt.
"""

import json
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import reconverge
from reconverge.base import environment, files, launcher
from reconverge.base.errors import Exit, Stop, explain
from reconverge.base.lock import Lock
from reconverge.base.terminal import say
from reconverge.config import compose, published
from reconverge.config.messages import spelled
from reconverge.config.settings import Train
from reconverge.data import folder
from reconverge.distributed import ranks
from reconverge.run import reader
from reconverge.training.clock import Clock

FACTS = ("code", "versions", "libraries", "data", "hardware", "pixels", "ranks")  # beside the settings
# The parts of a data set that have a fingerprint.
DATA = {"train": "training images", "val": "validation images", "order": "rules for the order of images"}


class Run:
    """Used as a context: whatever ends the training is written to status.json, and the lock is given back."""

    def __init__(self, cfg: Train, overrides: Sequence[str]):
        """`overrides`: of the command line. Errors: Stop(IN_USE, NOT_COMPARABLE)."""
        self.folder = reader.RUNS / cfg.run
        self.checkpoints = self.folder / "checkpoints"
        self.overrides = overrides
        self.writes = launcher.HERE.rank == 0
        self.step = 0  # of the training, as far as it has come
        self.saved = 0  # step of the newest checkpoint; status.json says it, if all of them are deleted
        self.closing = ExitStack()  # what is to be ended with the run, however it ends
        self._cfg = cfg
        self._clock: Clock | None = None  # None: the folder is as it was
        self._lock: Lock | None = None
        self._changed = False  # since the first start: then even a finished run begins, and records it
        try:
            self.resuming, self._environment = ranks.from_rank_0(self._open)
        except BaseException:
            if self._lock:
                self._lock.release()
            raise

    def _open(self) -> tuple[bool, dict[str, Any]]:
        """Whether the run goes on, and what its environment.json says."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_links()
        self._lock = Lock(self.folder / "lock")
        if self._lock.takeover:
            say(self._lock.takeover)
        new: dict[str, Any] = {"facts": {}, "lost": [], "starts": []}
        path = self.folder / "environment.json"
        if not reader.checkpoints(self.checkpoints):  # nothing to compare with
            if path.exists():  # starts that came to no checkpoint stay on record
                new["starts"] = reader.environment(self.folder)["starts"]
            self._refuse_lost_checkpoints(new["starts"])
            return False, new
        try:
            recorded = json.loads(files.read_text(path))
            before = compose.from_text(files.read_text(self.folder / "config.yaml"), Train)
        except (FileNotFoundError, ValueError) as error:
            raise Stop(
                Exit.DAMAGED,
                f"{self.folder} has checkpoints, but: {error}",
                "a run whose config.yaml and environment.json can be read",
                "restore the file, or run=NAME for a new run",
            ) from error
        self._settle(published.differences(before, self._cfg), recorded, self._cfg.resume_allow)
        return True, recorded

    def _refuse_links(self) -> None:
        """What this process will write in the folder must not land elsewhere. Errors: Stop(DAMAGED)."""
        for path in sorted(self.folder.iterdir()):
            below = path.iterdir() if path == self.checkpoints and not path.is_symlink() else ()
            for one in (path, *below):
                if one.is_symlink() and one.suffix != ".py":
                    raise files.no_plain_file(one)

    def _refuse_lost_checkpoints(self, starts: Sequence[dict[str, Any]]) -> None:
        """A run that has saved does not start over its own record. Errors: Stop(MISSING)."""
        path = self.folder / "status.json"
        status = reader.status(self.folder) if path.exists() else {}
        ended = status.get("step", 0) if status.get("reason") in ("done", "preempted") else 0
        saved = max([status.get("saved") or 0, ended, *(start.get("after_step", 0) for start in starts)])
        if saved:
            raise Stop(
                Exit.MISSING,
                f"{self.folder} has no checkpoint, but it has saved one after step {saved}, and its record is"
                " still there",
                "a run with its checkpoints, or a run that has never saved one",
                f"restore {self.checkpoints} from a copy; or run=NAME for a new run; or remove {self.folder}"
                " to begin this one again",
            )

    def finished(self) -> str | None:
        """The last line of a run that has nothing left to do."""
        return ranks.from_rank_0(self._finished)

    def _finished(self) -> str | None:
        if not self.resuming or self._changed or not (self.folder / "status.json").exists():
            return None
        status = reader.status(self.folder)
        over = status["step"] >= min(status["total"], self._cfg.steps or status["total"])
        return status["summary"] if over and status["reason"] == "done" else None

    # ---- what decides its bits ----

    def fact(self, name: str, value: Any, free: bool = False) -> None:
        """Something that decides the bits, the same on every rank. `free`: it may change, which only ends R2.

        Errors: Stop(NOT_COMPARABLE) if the run began with another value and may not go on with this.
        """
        before = self._environment["facts"].get(name)
        if self.resuming and before is not None and before != value:
            allowed = [name] if free else self._cfg.resume_allow
            ranks.from_rank_0(lambda: self._settle([(name, before, value)], self._environment, allowed))
        self._environment["facts"][name] = value

    def recorded(self, name: str) -> Any:
        """A fact of the first start; None for a new run."""
        return self._environment["facts"].get(name)

    def _settle(
        self, differences: list[tuple[str, Any, Any]], recorded: dict[str, Any], allowed: Sequence[str]
    ) -> None:
        """Refuse what differs from the first start (name, value then, value now), or note which promise is
        lost if all of it is allowed.
        """
        refused = [difference for difference in differences if difference[0] not in allowed]
        if refused:
            names = ",".join(name for name, *_ in refused)
            again = [f"{name}={spelled(old)}" for name, old, _ in refused if name not in FACTS]
            raise Stop(
                Exit.NOT_COMPARABLE,
                self._then_and_now(refused, recorded),
                "what it was started with: a resumed run gives the bits of an uninterrupted one (R2)",
                f"run=NAME for a new run, or remove {self.folder} to start over; to resume it:"
                f" {' '.join(again) or 'the same again'}, or resume_allow=[{names}], which gives up R2",
            )
        self._changed = self._changed or bool(differences)
        for name, *values in differences:
            old, new = differing(*values)
            recorded["lost"].append(
                {"time": _now(), "promise": "R2", "because": name, "from": old, "to": new}
            )
            say(
                f"{self._then_and_now([(name, *values)], recorded)}: promise R2 is lost, and environment.json"
                " records it"
            )

    def _then_and_now(self, differences: list[tuple[str, Any, Any]], recorded: dict[str, Any]) -> str:
        """In words what the run began with and what is there now."""
        then, now = zip(*(self._words(*difference, recorded) for difference in differences), strict=True)
        return f"{self.folder} was started with {', '.join(then)}; now {', '.join(now)}"

    def _words(self, name: str, old: Any, new: Any, recorded: dict[str, Any]) -> tuple[str, str]:
        """One difference: what was there and what is. Of fingerprints and hashes nobody reads the letters."""
        if name == "code":
            commit = (recorded.get("git") or {}).get("commit", "")[:7]
            return f"other code{f' (commit {commit})' if commit else ''}", "the code here"
        if name == "data":
            changed = " and ".join(self._other_images(part, old, new) for part in differing(old, new)[0])
            return f"other {changed}", f"those of data={self._cfg.data.name} data.root={self._cfg.data.root}"
        if name in ("versions", "libraries"):
            then, now = (
                ", ".join(f"{package} {version or '(absent)'}" for package, version in versions.items())
                for versions in differing(old, new)
            )
            return then, now
        if name == "init" and isinstance(old, dict):
            then, now = (f"{start['text']} (sha256 {start['sha256'][:12]})" for start in (old, new))
            return then, now
        old, new = differing(old, new)
        sign = " " if name in FACTS else "="
        return f"{name}{sign}{spelled(old)}", f"{name}{sign}{spelled(new)}"

    def _other_images(self, part: str, old: dict[str, Any], new: dict[str, Any]) -> str:
        """One part of the data that has changed, and the first files that differ, where they are known."""
        cache = Path(self._cfg.data.cache).expanduser()
        changed = folder.differences(cache, str(old.get(part)), str(new.get(part)))
        more = f"; and {len(changed) - 5} more" if changed[5:] else ""
        return DATA.get(part, part) + (f" ({'; '.join(changed[:5])}{more})" if changed else "")

    def lost(self) -> list[str]:
        return [entry["because"] for entry in self._environment["lost"]]

    def promises(self) -> dict[str, bool]:
        """R1 re-run, R2 resume, R3 data-elastic, R4 weight-elastic: which of them this run keeps."""
        same_bits = self._cfg.deterministic and not self.lost()
        return {"R1": same_bits, "R2": same_bits, "R3": True, "R4": same_bits and self._cfg.reduce == "tree"}

    # ---- its beginning and its end ----

    def begin(self, step: int, clock: Clock, classes: list[str], notes: list[str], decoder: str) -> None:
        """Training goes on after `step`. Only now is the folder changed: whatever might refuse has agreed.

        `notes`: what is to be known of the data, such as that it is a lossy copy. `decoder`: what decodes its
        images from now on.
        """
        self.step, self.saved, self._clock = step, step, clock
        command = shlex.join([sys.executable, sys.argv[0], *self.overrides])
        start = {"time": _now(), "after_step": step, "command": command, "decoder": decoder}
        self._environment |= {
            "reconverge": reconverge.__version__,
            "git": environment.git(),
            "packages": environment.versions(),
            "promises": self.promises(),
            "data_notes": notes,
            "starts": [*self._environment["starts"], start | environment.host()],
        }
        self.write("environment.json", json.dumps(self._environment, indent=1))
        self.write("config.yaml", compose.to_text(self._cfg))
        self.write("classes.txt", "".join(f"{name}\n" for name in classes))
        self.status("running", Exit.DONE)

    def status(self, reason: str, code: int, summary: str = "", comparison: str | None = None) -> None:
        """status.json. `comparison`: with the published number, in words."""
        assert self._clock is not None, "begin() comes first"
        entries = {
            "reason": reason,
            "exit_code": int(code),
            "step": self.step,
            "saved": self.saved,
            "end": self._clock.end,
            "total": self._clock.total,
            "steps_per_epoch": self._clock.steps_per_epoch,
            "summary": summary,
            "comparison": comparison,
            "time": _now(),
        }
        self.write("status.json", json.dumps(entries, indent=1))

    def write(self, name: str, text: str) -> None:
        """Replace a file of the folder whole."""
        if self.writes:
            files.write_whole(self.folder / name, text)

    def still_mine(self) -> None:
        """Before anything is written that matters. Errors: Stop(IN_USE)."""
        if self._lock:
            self._lock.check()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._clock is not None:
            try:
                self._failed(error, explain(error))
            except OSError:
                pass  # a full disk is what ended the run; the exit code says so
        self.closing.close()
        if self._lock:
            self._lock.release()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _failed(self, error: BaseException, stop: Stop | None) -> None:
        if self.writes:
            self.status("failed", stop.code if stop else Exit.BUG, str(stop or repr(error)))
            return
        path = self.folder / "errors" / f"rank-{launcher.HERE.rank}.txt"
        path.parent.mkdir(exist_ok=True)
        files.write_whole(
            path, "".join([_now(), "\n", *traceback.format_exception(error), f"{stop or ''}\n"])
        )
        if stop:
            stop.told = True


def differing(old: Any, new: Any) -> tuple[Any, Any]:
    """Of two tables the entries that differ; two values as they are."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old, new
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return {name: old.get(name) for name in names}, {name: new.get(name) for name in names}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
