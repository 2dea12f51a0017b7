"""A run of Weights & Biases: how it starts, online or offline, and a logger whose errors never stop a run of ours."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from recondense.config.logger import PROJECT, WandbConfig, mode_of_variables, with_variables
from recondense.config.schema import Config
from recondense.offline import PROBE_SECONDS, server_answers
from recondense.report.summary import name_of

INIT_SECONDS = 9.0  # with the check before it, an offline run starts within about 15 s
FINISH_SECONDS = 300.0  # how long the end of a run waits for the upload, if the network has failed since
SERVER = "https://api.wandb.ai"
LATER = "`wandb sync` uploads the offline log"
FOLDERS = ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")  # where W&B keeps files beside those of the run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Names:
    """How a W&B run is called where neither the config nor W&B's variables say it.

    Args:
        name: the name.
        job_type: the job type.
        tags: tags that are added to those of the config.
    """

    name: str
    job_type: str
    tags: Sequence[str] = ()


def names_of(config: Config) -> Names:
    """Return how the W&B run of a run is called where nobody says it."""
    tags = (Path(name_of(config.model)).name, str(config.method.get("name", "none")), config.recovery.name)
    return Names(f"{config.experiment_name}-{config.run_hash()}", "compress", tags)


class QuietWandbLogger(WandbLogger):
    """Lightning's W&B logger, except that an error of W&B only stops the logging, with a warning."""

    broken = False

    def attempt(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """Call an action of W&B on the first process. Return whether it failed, which is logged as a warning."""
        if not is_first_rank():
            return False
        try:
            action(*args, **kwargs)
        except Exception as error:
            log.warning("W&B: an entry was not logged (%s: %s); the run continues", type(error).__name__, error)
            return True
        return False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not self.broken and self.attempt(super().log_metrics, metrics, step):
            self.broken = True
            log.warning("W&B: logging of metrics stopped")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because the W&B run already has the resolved config."""


def is_first_rank() -> bool:
    """Return whether this process logs."""
    return getattr(rank_zero_only, "rank", 0) == 0


def wandb_mode(mode: str) -> str:
    """Return the mode to use, `online`, `offline` or `disabled`, such that W&B never prompts for a login.

    `auto` follows the variables WANDB_DISABLED and WANDB_MODE. Without them, the mode is `online` if there is a login
    (WANDB_API_KEY or netrc), else `offline`. `online` without a login becomes `offline`, with a warning.
    """
    if mode == "auto":
        variable = mode_of_variables(os.environ)
        if variable in ("offline", "disabled"):
            return variable
        return "online" if _has_login() else "offline"
    if mode == "online" and not _has_login():
        log.warning("W&B: there is no login (WANDB_API_KEY or `wandb login`), so this run is logged offline")
        return "offline"
    return mode


def run_arguments(settings: WandbConfig, names: Names) -> dict[str, Any]:
    """Return the arguments of `wandb.init` that say what a run is called: the config, W&B's variables, or `names`.

    Args:
        settings: the settings of the config.
        names: what the run is called otherwise.
    """
    given = with_variables(settings, os.environ)
    return {
        "project": given.project or PROJECT,
        "entity": given.entity,
        "name": given.name or names.name[:128],
        "group": given.group,
        "job_type": given.job_type or names.job_type,
        "tags": list(dict.fromkeys((*given.tags, *(tag.strip()[:64] for tag in names.tags if tag.strip())))),
        "notes": given.notes,
    }


def start_wandb(
    mode: str, folder: Path, arguments: Mapping[str, Any], resolved_config: Mapping[str, Any], run_id: str
) -> list[QuietWandbLogger]:
    """Start a run of W&B, offline if the server does not answer or refuses the run. This takes at most some 15 s.

    Args:
        mode: online or offline.
        folder: the folder for W&B's files.
        arguments: arguments of `wandb.init`, see `run_arguments`.
        resolved_config: the config of the run, as plain containers.
        run_id: the id of the run.

    Returns:
        its logger; empty if W&B does not start at all, which is logged as a warning.
    """
    if mode == "online" and not _server_answers():
        log.warning("W&B: %s does not answer, so this run is logged offline; %s", _server(), LATER)
        mode = "offline"
    folder.mkdir(parents=True, exist_ok=True)
    _make_folders_usable(folder)
    common = {**arguments, "dir": str(folder), "config": dict(resolved_config)}
    try:
        run = _init(mode, {**common, "id": run_id})
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        log.warning("W&B: could not start %s (%s), so this run is logged offline; %s", mode, reason, LATER)
        try:
            # Variables that W&B cannot read are the same for every attempt; `arguments` has what they say.
            with _without_variables():
                run = _init("offline", {**common, "id": _end_failed_start(run_id)})
        except Exception as second:
            log.warning("W&B: could not start offline either (%s: %s)", type(second).__name__, second)
            return []
    if not run.settings.mode.startswith("offline"):
        log.info("W&B: %s", run.url)
    return [QuietWandbLogger(experiment=run, save_dir=str(folder), project=arguments["project"], id=run_id)]


def _init(mode: str, arguments: Mapping[str, Any]) -> Any:
    import wandb

    waits = {"finish_timeout": FINISH_SECONDS} if "finish_timeout" in wandb.Settings.model_fields else {}
    run = wandb.init(
        **arguments,
        # An offline run cannot be resumed; `wandb sync` joins the starts that share an id.
        resume="allow" if mode == "online" else None,
        mode=mode,  # type: ignore[arg-type]
        reinit="create_new",  # neither reuse nor end another W&B run that is open in this process
        save_code=False,
        settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS, **waits),
    )
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run


def _end_failed_start(run_id: str) -> str:
    """End W&B's process, which still holds the id of a run that did not start; return the id for the next attempt.

    If the user has another run of W&B in this process, it goes on, and the next attempt needs another id.
    """
    import wandb

    if wandb.run is not None:
        return secrets.token_hex(4)
    try:
        wandb.teardown(exit_code=0)
    except (Exception, SystemExit) as error:  # it exits with the code of its own process
        log.debug("W&B: teardown failed: %s", error)
    return run_id


@contextmanager
def _without_variables() -> Iterator[None]:
    """Remove W&B's environment variables inside the context, except those of folders, and let it start offline."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith("WANDB_") and name not in FOLDERS}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _make_folders_usable(folder: Path) -> None:
    """Set the variables of those folders of W&B in which it cannot write to a subfolder of `folder`.

    Otherwise tables and pictures would not be logged.
    """
    import wandb.env

    defaults = {
        "WANDB_CACHE_DIR": str(wandb.env.get_cache_dir()),
        "WANDB_CONFIG_DIR": "~/.config/wandb",
        "WANDB_DATA_DIR": str(wandb.env.get_data_dir()),
    }
    for variable in FOLDERS:
        path = os.path.expanduser(os.environ.get(variable) or defaults[variable])
        if not _is_writable(Path(path)):
            os.environ[variable] = str(folder / "wandb" / "files")
            log.warning("W&B: %s is not writable, so %s is used instead", path, os.environ[variable])


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL") or SERVER


def _server_answers() -> bool:
    """Return whether W&B's server answers. A proxy of W&B's own settings is not tested."""
    if any(os.environ.get(name) for name in ("WANDB_HTTP_PROXY", "WANDB_HTTPS_PROXY")):
        return True
    return server_answers(f"{_server().rstrip('/')}/graphql", PROBE_SECONDS)


def _has_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlsplit(_server()).hostname
    except ValueError:
        host = None
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        try:
            if (host or urlsplit(SERVER).hostname) in netrc.netrc(os.path.expanduser(candidate)).hosts:
                return True
        except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
            continue
    return False
