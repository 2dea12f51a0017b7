"""The folder of a run: what it holds, what may not lie in it, and how a run starts anew there."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from recondense.config.problems import Problem
from recondense.config.schema import WORK, Config, DataConfig
from recondense.config.stages import resolve_stages
from recondense.errors import ConfigError
from recondense.files import write_aside

CONFIG = "config.yaml"
INPUTS = "inputs.json"
RESULTS = (INPUTS, "plan.json", "plan.png", "summary.json", "stages", "checkpoints", "logs", "model", WORK)
CONTENTS = (CONFIG, *RESULTS)  # overwrite=true deletes these and nothing else
MOVED = ".moved"  # results of the old run while they are moved away; `repair` moves them back
DELETED = ".deleted"  # all results of the old run; `repair` deletes them
MOST_LINKS = 40  # that lead to one path; the limit of Linux
Setting = tuple[str, str]  # name and path

log = logging.getLogger(__name__)


def overwritten_inputs(configs: Sequence[Config]) -> list[Problem]:
    """Return inputs of runs that lie in what `overwrite=true` deletes, or that contain it.

    Links are followed: a path is lost as well when a link that leads to it is deleted.

    Args:
        configs: of all runs of a command; one may delete what another reads.
    """
    deleted: dict[tuple[int, int], Path] = {}
    around: dict[tuple[int, int], Path] = {}
    for folder in dict.fromkeys(config.run_folder() for config in configs if config.overwrite):
        places = {place: identity for name in CONTENTS if (identity := _identity(place := folder / name))}
        deleted |= {identity: place for place, identity in places.items()}
        if places:
            above = [folder.resolve(), *folder.resolve().parents]
            around |= {identity: folder for place in above if (identity := _identity(place))}
    if not deleted:
        return []
    problems = []
    for name, path in dict.fromkeys(setting for config in configs for setting in input_paths(config)):
        lost = next((deleted[place] for place in _identities(path) if place in deleted), None)
        target = _identity(Path(os.path.realpath(os.path.expanduser(path))))
        if lost is not None:
            text = f"the run reads it, and overwrite=true would delete {lost}. Choose another run_dir."
            problems.append(Problem(name, text, path))
        elif target in around and os.path.isdir(os.path.expanduser(path)):
            text = (
                f"the run reads it, and overwrite=true would delete a part of it, the run in {around[target]}. Choose "
                "another run_dir."
            )
            problems.append(Problem(name, text, path))
    return problems


def input_paths(config: Config) -> list[Setting]:
    """Return settings that name what the run reads on this machine; those that name something of the hub are left out."""
    recovery = config.recovery
    settings = [
        ("model.path", config.model.path),
        ("model.tokenizer", config.model.tokenizer),
        ("recovery.teacher_path", recovery.teacher_path),
        ("evaluation.include_path", config.evaluation.include_path),
        ("cache_dir", config.cache_dir),
        *_data_paths(config.data, "data"),
    ]
    for stage in resolve_stages(config)[0] if recovery.stages else ():
        if stage.recovery.teacher_path != recovery.teacher_path:
            settings.append((f"{stage.where}.teacher_path", stage.recovery.teacher_path))
        if stage.own_texts:
            settings += _data_paths(stage.data, f"{stage.where}.data")
    return [(name, path) for name, path in settings if path and os.path.lexists(os.path.expanduser(path))]


def _data_paths(data: DataConfig, where: str) -> list[tuple[str, str | None]]:
    sources = [
        (f"{where}.calibration.sources[{index}].{name}", getattr(source, name))
        for index, source in enumerate(data.calibration.sources or ())
        for name in ("path", "dataset")
    ]
    splits = [(f"{where}.{split}.path", getattr(data, split).path) for split in ("calibration", "train", "validation")]
    return [*splits, (f"{where}.dataset", data.dataset), *sources]


def _identities(path: str) -> Iterator[tuple[int, int]]:
    """Yield identities of all that lies on the way to a path, and on the way to each target of a link inside a folder."""
    links = [
        os.path.join(folder, name)
        for folder, folders, files in os.walk(os.path.expanduser(path))
        for name in (*folders, *files)
        if os.path.islink(os.path.join(folder, name))
    ]
    for start in (os.path.expanduser(path), *links):
        yield from filter(None, map(_identity, _way(start)))


def _way(path: str) -> Iterator[Path]:
    """Yield every folder, file and link on the way to a path, links before what they lead to."""
    rest = [*reversed((Path.cwd() / path).parts)]
    here, links = Path(rest.pop()), 0
    while rest:
        part = rest.pop()
        here = here.parent if part == ".." else here / part
        yield here
        if os.path.islink(here) and links < MOST_LINKS:
            links += 1
            rest += reversed(Path(os.readlink(here)).parts)  # the root among them takes the place of all before it
            here = here.parent


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and number of a file, folder or link; the same whatever it is called."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def lock_folder(folder: Path, *, resumes: bool) -> Iterator[None]:
    """Inside, no other run works in a folder. All processes of a run come here together.

    Args:
        folder: of the run; made if it is not there, and repaired after a kill.
        resumes: whether what lies there is used; then a line of the log says so.

    Raises:
        ConfigError: another run works in it.
    """
    from recondense import processes  # late: it imports torch, and a command is checked without

    if not processes.is_first():
        processes.barrier()
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            [f"run folder {folder}: another process is working in it; wait for it or set run_dir"]
        ) from None
    try:
        repair(folder)
        if resumes and (folder / CONFIG).exists():
            log.info("resuming in %s", folder)
        processes.barrier()
        yield
    finally:
        lock.release()


def begin(config: Config, folder: Path) -> None:
    """Write the run's config; `overwrite=true` deletes what an earlier run left.

    Call it when the model and the texts have been read, so that a run that cannot begin deletes nothing.
    """
    if config.overwrite:
        _delete_results(folder)
    if config.overwrite or not (folder / CONFIG).exists():
        write_aside(folder / CONFIG, config.to_yaml())


def _delete_results(folder: Path) -> None:
    """Delete all results, or none where that fails: they go into a folder first, which is renamed when it has them all.

    The old config stays until the new one replaces it: a folder without one would be taken for somebody else's.
    """
    repair(folder)
    (folder / MOVED).mkdir()
    try:
        for name in RESULTS:
            if os.path.lexists(folder / name):
                os.rename(folder / name, folder / MOVED / name)
        os.rename(folder / MOVED, folder / DELETED)
    finally:
        repair(folder)


def repair(folder: Path) -> None:
    """Finish what a kill interrupted: results that were not all moved away come back, others are deleted."""
    if (folder / MOVED).is_dir():
        for path in (folder / MOVED).iterdir():
            os.rename(path, folder / path.name)
        (folder / MOVED).rmdir()
    shutil.rmtree(folder / DELETED, ignore_errors=True)
