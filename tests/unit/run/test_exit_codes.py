"""Who writes the reason of an end, and with which exit code."""

from __future__ import annotations

import pytest

from recondense.run.exit_codes import another_says_it


@pytest.mark.parametrize(
    ("variables", "silent"),
    [
        ({}, False),
        ({"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0"}, False),
        ({"TORCHELASTIC_RUN_ID": "1", "RANK": "1", "LOCAL_RANK": "1"}, True),
        ({"TORCHELASTIC_RUN_ID": "1", "RANK": "8", "LOCAL_RANK": "0"}, False),  # of another machine, where files differ
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, True),
        ({"SLURM_PROCID": "4", "SLURM_LOCALID": "0"}, False),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),  # started by a run, which was checked
        ({"RANK": "1", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, False),
    ],
)
def test_one_process_of_each_machine_says_why(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], silent: bool
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert another_says_it() == silent
