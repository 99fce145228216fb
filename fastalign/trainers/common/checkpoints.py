"""Checkpoints that are there whole or not at all, and where a run continues from.

Everything is written into a hidden folder beside its place and renamed into it: a process that is killed while it
writes leaves what was there before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...models.loading import CONFIGS
from ...utils.text import first_line
from .config import CommonConfig

PARTIAL = ".partial"
"""Folder inside the output folder for what is being written or removed; nothing in it is ever read."""

_STATE, _FILES = "trainer_state.json", "files.json"

_WRITE_FAILED = ("No space", "I/O error", "IoError", "PytorchStreamWriter", "unexpected pos", "File too large", "quota")

_ANEW = (None, "false")  # values of resume_from_checkpoint
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def make_folder(output_dir: str) -> None:
    """Makes the output folder, if it is not there. ValueError if it cannot be one."""
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise ValueError(f"output_dir must be a folder; {output_dir!r} is none")
    try:
        os.makedirs(output_dir, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir must be a folder that can be made; got {output_dir!r}: {error}") from error


@contextlib.contextmanager
def writing(place: str, partial: str) -> Iterator[None]:
    """Whatever fails inside leaves no half-written file or folder `partial` behind, which would keep a disk full.

    Raises OSError, naming the place and the room on its disk, for what could not be written, whichever library tried.
    """
    try:
        yield
    except BaseException as error:
        if os.path.isdir(partial):
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds something else
                os.rmdir(os.path.dirname(partial))
        else:
            Path(partial).unlink(missing_ok=True)
        if _is_of_the_disk(error):
            free = shutil.disk_usage(_existing(place)).free
            raise OSError(
                f"{place} could not be written: {first_line(error)} ({free / 1e9:.2f} GB free there)"
            ) from error
        raise


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether a write failed: torch and safetensors say so in errors of their own."""
    own = type(error).__name__ == "SafetensorError" or isinstance(error, RuntimeError)
    return isinstance(error, OSError) or (own and any(word in str(error) for word in _WRITE_FAILED))


def _existing(place: str) -> str:
    """The place, or the nearest folder above it that is there."""
    path = Path(place).absolute()
    return str(next(p for p in (path, *path.parents) if p.exists()))


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with writing(str(path), str(partial)):
        partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
        os.replace(partial, path)


def write_folder(folder: str, write: Callable[[str], None], *, is_writer: bool = True) -> None:
    """Lets `write` fill a hidden folder, then moves what is in it into `folder`, the configuration last.

    Without that file no model can be loaded, so a model is there whole or not at all. In several processes all of them
    call this, since all of them may have a part in `write`; one is the writer.
    """
    partial = os.path.join(folder, PARTIAL, "model")
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
    with writing(folder, partial):
        write(partial)
    if is_writer:
        written = sorted(os.listdir(partial), key=lambda name: (name in CONFIGS, name))
        for name in CONFIGS.intersection(os.listdir(folder)):
            os.remove(os.path.join(folder, name))
        for name in written:
            publish(os.path.join(partial, name), os.path.join(folder, name))
        shutil.rmtree(os.path.join(folder, PARTIAL), ignore_errors=True)


def remove(folder: str) -> None:
    """Removes a folder; if that is cut short, nothing that looks like a checkpoint or a model is left."""
    grave = os.path.join(os.path.dirname(folder), PARTIAL, "removed-" + os.path.basename(folder))
    os.makedirs(os.path.dirname(grave), exist_ok=True)
    shutil.rmtree(grave, ignore_errors=True)
    os.replace(folder, grave)
    shutil.rmtree(grave)


def publish(partial: str, target: str) -> None:
    """Puts a written file or folder in its place, instead of one that may be there."""
    if os.path.isdir(target):
        remove(target)
    os.replace(partial, target)


def rotate(output_dir: str, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints until `limit` are left; the newest and the best one stay."""
    if not limit or limit < 1:
        return
    present = checkpoints(output_dir)
    kept = {os.path.abspath(path) for path in (present[-1:] + ([best] if best else []))}
    spare = [path for path in present if os.path.abspath(path) not in kept]
    for path in spare[: max(0, len(present) - max(limit, len(kept)))]:
        remove(path)


def checkpoints(output_dir: str) -> list[str]:
    """Whole checkpoints, oldest first. The trainer's state is written last, so where it can be read all is there."""
    return [path for path in _folders(output_dir) if _is_whole(path)]


def _folders(output_dir: str) -> list[str]:
    """What bears a checkpoint's name, in the order of the steps."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = {name: int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))}
    return [os.path.join(output_dir, name) for name in sorted(steps, key=lambda name: steps[name])]


def _is_whole(path: str) -> bool:
    try:
        with open(os.path.join(path, _STATE), encoding="utf-8") as file:
            json.load(file)
    except (OSError, json.JSONDecodeError):
        return False
    return True


def seal(folder: str) -> None:
    """Lists the files of a checkpoint that is about to be put in its place: `clear` removes no others."""
    write_json(Path(folder) / _FILES, sorted(_files(folder)))


def _files(folder: str) -> set[str]:
    """Paths inside the folder of all that is not a folder itself."""
    found = (os.path.join(place, name) for place, folders, names in os.walk(folder) for name in [*folders, *names])
    return {os.path.relpath(path, folder) for path in found if os.path.islink(path) or not os.path.isdir(path)}


def _foreign(path: str) -> list[str]:
    """What stands under a checkpoint's name and is not what `seal` found there."""
    if os.path.islink(path) or not os.path.isdir(path):
        return [path]
    try:
        own = {_FILES, *json.loads(Path(path, _FILES).read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        own = set()
    return [os.path.join(path, name) for name in sorted(_files(path) - own)]


def start_point(args: CommonConfig) -> str | None:
    """The checkpoint to continue from, or None to start anew. Nothing is removed: see `clear`.

    Raises ValueError if the output folder is none, if it holds checkpoints and the configuration says neither to
    continue nor to overwrite them, if it holds a model alone that is not to be overwritten, if checkpoints hold files
    that no run wrote, or if the checkpoint asked for is not whole.
    """
    output_dir = str(args.output_dir)
    make_folder(output_dir)
    wanted = args.resume_from_checkpoint
    if wanted in _ANEW:
        found = _folders(output_dir)
        if found and not args.overwrite_output_dir:
            raise ValueError(
                f"output_dir {output_dir!r} holds {os.path.basename(found[-1])}: continue it with "
                "--resume_from_checkpoint auto, or start anew with --overwrite_output_dir true"
            )
        there = sorted(name for name in CONFIGS if os.path.exists(os.path.join(output_dir, name)))
        if there and not args.overwrite_output_dir:
            raise ValueError(
                f"output_dir {output_dir!r} holds a model ({there[0]}): choose another folder, or write over it with "
                "--overwrite_output_dir true"
            )
        if foreign := [name for path in found for name in _foreign(path)]:
            raise ValueError(
                "overwrite_output_dir removes only checkpoints that fastalign wrote, and it did not write "
                f"{foreign[0]!r}: move it away, or choose another output_dir"
            )
        return None
    present = checkpoints(output_dir)
    if wanted in ("auto", "true"):
        return present[-1] if present else None
    if not _is_whole(str(wanted)):
        raise ValueError(f"resume_from_checkpoint must be auto or a folder with a whole checkpoint; got {wanted!r}")
    return wanted


def clear(args: CommonConfig) -> None:
    """Removes the checkpoints that `start_point` let pass, of a run that starts anew; one process calls it.

    To be called when the model, the data and all else that may be wrong has been loaded: nothing brings them back.
    """
    if args.overwrite_output_dir and args.resume_from_checkpoint in _ANEW:
        for path in _folders(str(args.output_dir)):
            remove(path)
