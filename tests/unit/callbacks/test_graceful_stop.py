"""A signal stops training after the current step, with a checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from support.forks import Forks

SCRIPT = """
import os, signal, sys, warnings
import lightning as L, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from recondense.callbacks.graceful_stop import GracefulStop

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        if batch_idx == 5:  # in the middle of the accumulation of step 2
            os.kill(os.getpid(), signal.Signals[sys.argv[2]])
        if batch_idx > 20:
            sys.exit("was not stopped")
        return self.layer(batch).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

warnings.simplefilter("ignore")
folder = sys.argv[1]
checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=100, save_top_k=1)
trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[GracefulStop(), checkpoints],
    default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=4)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(40, 2), batch_size=1))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_at_the_next_step_with_a_checkpoint(forks: Forks, tmp_path: Path, name: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = forks.run(tmp_path / "script.py", str(tmp_path / "run"), name, folder=tmp_path)
    assert done.returncode == 128 + signal.Signals[name], done.stderr
    # The signal came while the gradients of step 2 were being accumulated: that step was finished first.
    assert f"recondense: stopped by {name} after step 2" in done.stderr
    assert "Traceback" not in done.stderr
    (path,) = (tmp_path / "run").glob("*.ckpt")
    assert path.name == "step=2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 2
    (state,) = (value for key, value in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))
    assert state["best_model_path"] == str(path)
