"""The folder of a run: its contents, its lock, and how `overwrite=true` replaces the results in it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from recondense.config.problems import Problem, render
from recondense.config.run_records import CONFIG, INPUTS, SUMMARY, run_inside
from recondense.config.schema import WORK, Config, DataConfig
from recondense.errors import ConfigError
from recondense.files import write_aside
from recondense.run.resolved_run import Run

RESULTS = (INPUTS, "plan.json", "plan.png", SUMMARY, "rounds", "stages", "checkpoints", "logs", "model", WORK)
CONTENTS = (CONFIG, *RESULTS)  # overwrite=true deletes these and nothing else
MOVED = ".moved"  # results of the old run while they are being moved; `repair` moves them back
DELETED = ".deleted"  # all results of the old run; `repair` deletes them
MOST_LINKS = 40  # maximum number of links to follow for one path, as in Linux
Setting = tuple[str, str]  # name and path

log = logging.getLogger(__name__)


def has_summary(config: Config) -> bool:
    """Return whether the run of a config has been done, and is not to be started over."""
    return not config.plan_only and not config.overwrite and os.path.lexists(config.run_folder() / SUMMARY)


def overwritten_inputs(runs: Sequence[Run]) -> list[Problem]:
    """Return a problem for each input that `overwrite=true` would delete, entirely or in part.

    Links are followed: deleting a link on the path to an input counts as deleting the input.

    Args:
        runs: all runs of a command, because one run may delete the input of another.
    """
    deleted: dict[tuple[int, int], Path] = {}
    around: dict[tuple[int, int], Path] = {}
    for folder in dict.fromkeys(run.config.run_folder() for run in runs if run.config.overwrite):
        places = {place: identity for name in CONTENTS if (identity := _identity(place := folder / name))}
        deleted |= {identity: place for place, identity in places.items()}
        if places:
            above = [folder.resolve(), *folder.resolve().parents]
            around |= {identity: folder for place in above if (identity := _identity(place))}
    if not deleted:
        return []
    problems = []
    for name, path in dict.fromkeys(setting for run in runs for setting in input_paths(run)):
        lost = next((deleted[place] for place in _identities(path) if place in deleted), None)
        target = _identity(Path(os.path.realpath(os.path.expanduser(path))))
        if lost is not None:
            text = f"this is an input of the run, and overwrite=true would delete {lost}. Choose another run_dir."
            problems.append(Problem(name, text, path))
        elif target in around and os.path.isdir(os.path.expanduser(path)):
            text = (
                f"this is an input of the run, and overwrite=true would delete a part of it, the run in "
                f"{around[target]}. Choose another run_dir."
            )
            problems.append(Problem(name, text, path))
    return problems


def input_paths(run: Run) -> list[Setting]:
    """Return the settings that name existing local inputs of a run. Hub ids are left out."""
    return [(name, path) for name, path in named_inputs(run) if os.path.lexists(os.path.expanduser(path))]


def named_inputs(run: Run) -> list[Setting]:
    """Return the settings that name inputs of a run: folders, files and hub ids."""
    config, recovery = run.config, run.config.recovery
    settings = [
        ("model.path", config.model.path),
        ("model.tokenizer", config.model.tokenizer),
        ("recovery.teacher_path", recovery.teacher_path),
        ("evaluation.include_path", config.evaluation.include_path),
        ("cache_dir", config.cache_dir),
        *_data_paths(config.data, "data"),
    ]
    for stage in run.stages if recovery.stages else ():
        if stage.recovery.teacher_path != recovery.teacher_path:
            settings.append((f"{stage.where}.teacher_path", stage.recovery.teacher_path))
        if stage.own_texts:
            settings += _data_paths(stage.data, f"{stage.where}.data")
    return [(name, path) for name, path in settings if path]


def _data_paths(data: DataConfig, where: str) -> list[tuple[str, str | None]]:
    sources = [
        (f"{where}.calibration.sources[{index}].{name}", getattr(source, name))
        for index, source in enumerate(data.calibration.sources or ())
        for name in ("path", "dataset")
    ]
    splits = [(f"{where}.{split}.path", getattr(data, split).path) for split in ("calibration", "train", "validation")]
    return [*splits, (f"{where}.dataset", data.dataset), *sources]


def _identities(path: str) -> Iterator[tuple[int, int]]:
    """Yield identities of everything on the way to a path, and on the way to the targets of all links below it."""
    links = [
        os.path.join(folder, name)
        for folder, folders, files in os.walk(os.path.expanduser(path))
        for name in (*folders, *files)
        if os.path.islink(os.path.join(folder, name))
    ]
    for start in (os.path.expanduser(path), *links):
        yield from filter(None, map(_identity, _way(start)))


def _way(path: str) -> Iterator[Path]:
    """Yield every folder, file and link on the way to a path, each link before its target."""
    rest = [*reversed((Path.cwd() / path).parts)]
    here, links = Path(rest.pop()), 0
    while rest:
        part = rest.pop()
        here = here.parent if part == ".." else here / part
        yield here
        if os.path.islink(here) and links < MOST_LINKS:
            links += 1
            rest += reversed(Path(os.readlink(here)).parts)  # an absolute target replaces the path so far
            here = here.parent


def owners(folder: Path) -> Iterator[Path]:
    """Yield the folders of the runs, if they are runs, of whose results a folder is a part, also through links."""
    yield from (place.parent for place in _way(str(folder)) if place.name in RESULTS)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a file, folder or link, which do not depend on its name; None if it is missing."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def lock_folder(folder: Path, *, resumes: bool) -> Iterator[None]:
    """Lock a run's folder against other runs. All processes of the run must call this function together.

    Args:
        folder: the run's folder. It is created if necessary, and repaired after a kill.
        resumes: whether the run uses results in the folder. If there are any, this is logged.

    Raises:
        ConfigError: another run is working in the folder, or the folder cannot be created.
    """
    from recondense import processes  # late: imports torch, which the fast checks do not need

    if not processes.is_first():
        processes.barrier()
        yield
        return
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            [f"run folder {folder}: another process is working in it; wait until it ends, or set another run_dir"]
        ) from None
    except OSError as error:
        text = f"cannot be written to ({error.strerror}). Choose another output_dir or run_dir."
        raise ConfigError(render([Problem("run_dir", text, folder)])) from error
    except NotImplementedError as error:
        text = "its file system has no locks. Choose another output_dir or run_dir."
        raise ConfigError(render([Problem("run_dir", text, folder)])) from error
    try:
        repair(folder)
        if resumes and (folder / CONFIG).exists():
            log.info("resuming in %s", folder)
        processes.barrier()
        yield
    finally:
        lock.release()


def begin(config: Config, folder: Path) -> None:
    """Write the run's config; with `overwrite=true`, first delete the results of an earlier run.

    Call this function after reading the model and the texts, so that a run that cannot begin deletes nothing.
    """
    if config.overwrite:
        _delete_results(folder)
    if config.overwrite or not (folder / CONFIG).exists():
        write_aside(folder / CONFIG, config.to_yaml())


def _delete_results(folder: Path) -> None:
    """Delete all results, or none if that fails: they are moved to a folder, which is renamed once it has all of them.

    The old config remains until the new one replaces it, because a folder without a config is refused as foreign.
    """
    if problem := run_to_keep(folder):  # it began after the checks
        raise ConfigError(render([problem]))
    repair(folder)
    (folder / MOVED).mkdir()
    try:
        for name in RESULTS:
            if os.path.lexists(folder / name):
                os.rename(folder / name, folder / MOVED / name)
        os.rename(folder / MOVED, folder / DELETED)
    finally:
        repair(folder)


def run_to_keep(folder: Path) -> Problem | None:
    """Return a problem if another run lies in what a run in this folder replaces or deletes."""
    if (inner := run_inside(folder / name for name in RESULTS)) is None:
        return None
    text = f"another run is in {inner}, where this run would delete it. Move that folder, or choose another run_dir."
    return Problem("run_dir", text, folder)


def clear_work(folder: Path) -> None:
    """Delete the temporary files of a run."""
    if run_inside([folder / WORK]) is None:
        shutil.rmtree(folder / WORK, ignore_errors=True)


def repair(folder: Path) -> None:
    """Finish an interrupted deletion: restore the results if not all had been moved, else delete them."""
    if (folder / MOVED).is_dir():
        for path in (folder / MOVED).iterdir():
            os.rename(path, folder / path.name)
        (folder / MOVED).rmdir()
    shutil.rmtree(folder / DELETED, ignore_errors=True)
