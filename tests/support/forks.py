"""Commands in processes of their own that need no seconds for imports: forks of a process that has imported everything.

They show what only a process can show: a command that is killed, an exit code, output without anything from the tests.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]


class Forks:
    """A process that waits for commands and runs them in forks of itself, one after the other."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={
                **os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT, ROOT / "tests"))),
                "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
            },
        )  # fmt: skip

    def run(
        self, script: Path | str, *arguments: str, folder: Path, kill_at: str = "never"
    ) -> subprocess.CompletedProcess[str]:
        """Run `python SCRIPT ARGUMENTS` in the folder; `kill_at` is a phase of `support.runs.kill_at`."""
        assert self._server.stdin is not None and self._server.stdout is not None
        streams = [folder / ".stdout", folder / ".stderr"]
        job = {"arguments": [str(script), *arguments], "folder": str(folder), "kill_at": kill_at}
        print(json.dumps(job), file=self._server.stdin, flush=True)
        code = int(self._server.stdout.readline())
        out, err = (stream.read_text() for stream in streams)
        for stream in streams:
            stream.unlink()
        return subprocess.CompletedProcess(job["arguments"], code, out, err)

    def close(self) -> None:
        with self._server:  # closes its pipes
            self._server.kill()


def serve() -> None:
    """Run the commands that arrive as lines of JSON, and answer each with its exit code."""
    import recondense.callbacks.sweep
    import recondense.run.pipeline
    import recondense.run.print_sizes  # noqa: F401
    import train  # noqa: F401
    from support.read_once import freeze_imported_objects, read_configs_once
    from support.runs import kill_at
    from support.searched import steps_of

    read_configs_once()
    steps_of("cdmoe")  # reads the configs that all commands read
    freeze_imported_objects()
    while line := sys.stdin.readline():
        job = json.loads(line)
        child = os.fork()
        if not child:
            os.chdir(job["folder"])
            for number, name in enumerate((os.devnull, ".stdout", ".stderr")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
            kill_at(job["kill_at"])
            sys.argv = job["arguments"]
            sys.path.insert(0, str(Path(sys.argv[0]).parent))
            _end(sys.argv[0])
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _end(script: str) -> NoReturn:
    """Run a script and exit as Python does, except that imported modules are not torn down."""
    code: Any = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve()
