"""Training states: damaged ones, and what cannot be resumed."""

import functools
import os
from unittest import mock

import numpy as np
import torch
from torch.utils._pytree import tree_map

from tests.common import run_contents, same
from tests.resume import ResumeGroup

__unittest = True


class Checkpoint(ResumeGroup):
    """Training states that are damaged, of another version, or of another run; full disks and locks."""

    def change(self, run, **entries):
        """Replace entries of a run's training state."""
        file = run / "checkpoints" / "training_state.pt"
        file.write_bytes(self.checkpoint.serialize({**torch.load(file, weights_only=True), **entries}))

    def test_latest_run_is_the_one_saved_last_whatever_its_name(self):
        log_dir = self.folder()
        for name in ("z20", "a"):
            self.finished_run("--epochs", "1").rename(log_dir / name)
        (log_dir / "2999_01_01_00_00_00").mkdir()  # has no checkpoint
        flags = "latest", "--log_dir", log_dir
        self.assertIn(f"run:    {log_dir / 'a'}", self.resume(*flags)[1])
        self.assert_resumed(log_dir / "z20", "--epochs", 2)
        self.assertIn(f"run:    {log_dir / 'z20'}", self.resume(*flags)[1])
        (log_dir / "z20" / "checkpoints" / "training_state.pt").write_bytes(b"half")
        self.assert_refused(self.resume(*flags), 1, log_dir / "z20", "is damaged")

    def test_contradicting_flags_are_rejected_by_name(self):
        run = self.finished_run("--epochs", "2")
        before = run_contents(run)
        for flag, value in (("--z_dim", 3), ("--batch_size", 32), ("--lambda_", 1), ("--ae_lr", 0.1), ("--d_lr", 0.1),
                            ("--seed", 1), ("--dataset", "auto"), ("--epochs", 1), ("--networks", "base"),
                            ("--posterior", "gaussian")):
            self.assert_refused(self.resume(run, flag, value), 2, flag)
        self.assert_resumed(run, "--z_dim", 8, "--num_workers", 2)
        self.assert_same_contents(run, before)

    def test_what_cannot_be_resumed(self):
        run = self.finished_run("--epochs", "1")
        empty, file = self.folder(), self.folder() / "training_state.pt"
        file.write_bytes(b"")
        for wrong, named in ((empty, empty), (empty / "none", empty / "none"), (file, file), ("latest", empty),
                             (run / "checkpoints" / "model_checkpoint.pt", "model_checkpoint.pt"), ("", "")):
            self.assert_refused(self.run_cli("--resume", wrong, "--log_dir", empty), 1, named, "resume")
        for place in ("builtins.open", "os.truncate"):  # a run of somebody else; on Windows, one that is being read
            with next(run.glob("events.out.*")).open("ab") as events:
                events.write(b"later")
            with mock.patch(place, side_effect=PermissionError(13, "Permission denied", str(run / "x"))):
                self.assert_refused(self.resume(run), 1, run, "Permission denied")
        self.change(run, format="adversarial autoencoder, training state 1")
        self.assert_refused(self.resume(run), 1, run / "checkpoints" / "training_state.pt", "of this version")

    def test_damaged_checkpoint_is_rejected_and_the_previous_one_offered(self):
        run, _ = self.train_quietly("--epochs", "2", "--checkpoint_every", "1")
        whole, current = run_contents(run), run / "checkpoints" / "training_state.pt"
        previous, content = current.with_name("training_state.previous.pt"), current.read_bytes()
        damages = [content[:-100], b"", b"not a checkpoint", self.checkpoint.serialize({"weight": torch.zeros(3)})]
        for place in np.linspace(len(content) // 4, len(content) // 2, 4, dtype=int):  # among the data of tensors
            damages.append(content[:place] + bytes([content[place] ^ 16]) + content[place + 1:])  # one bit
        for damage in damages:
            current.write_bytes(damage)
            self.assert_refused(self.resume(run), 1, current, f"--resume {previous}")
        self.assertEqual(self.checkpoint.load_state(previous)["epoch"], 1)
        self.assert_resumed(previous)
        self.assert_same_contents(run, whole)
        for file in (previous, current):
            file.write_bytes(b"")
        self.assert_refused(self.resume(run), 1, current, "is damaged, or not a checkpoint; name another file\n")

    def test_checkpoint_of_another_model_or_optimizer(self):
        run = self.finished_run("--epochs", "1")
        before = run_contents(run)

        def plain(z_dim):  # with the same weights, but without a stream for samples
            model = self.models.AdversarialAE(z_dim)
            del model.sample_stream
            model.sample = lambda batch_size: model.decoder(torch.randn(batch_size, z_dim))
            return model

        base = functools.partial(self.models.AdversarialAE, networks="base")
        with mock.patch.object(self.train, "AdversarialAE", base):
            self.assert_refused(self.resume(run), 1, run, "does not fit models.py")
        with mock.patch("torch.optim.Adam", lambda weights, lr, **_: torch.optim.RMSprop(weights, lr)):
            self.assert_refused(self.resume(run), 1, run, "RMSprop")
        self.assert_same_contents(run, before)
        with mock.patch.object(self.train, "AdversarialAE", plain):
            self.assert_resumed(run, "--epochs", 2)

    def test_state_of_another_device_and_version(self):
        run = self.finished_run("--epochs", "1")
        state = self.checkpoint.load_state(run)
        cuda_layout = tree_map(lambda part: part.contiguous() if torch.is_tensor(part) else part, state["optimizer_ae"])
        del state["settings"]["precision"]  # as if the flag were newer than the run
        self.change(run, optimizer_ae=cuda_layout, settings={**state["settings"], "device": "cuda"},
                    random={**state["random"], "device": torch.zeros(16, dtype=torch.uint8)})
        self.assertIn("began with cuda and continues with cpu", self.assert_resumed(run, "--epochs", 2))
        self.assert_same_contents(run, self.finished_run("--epochs", "2"))

    def test_finished_run_is_resumed_from_any_folder_and_locked(self):
        run = self.finished_run("--epochs", "1")
        file = run / "checkpoints" / "model_checkpoint.pt"
        weights = torch.load(file, weights_only=True)
        file.unlink()  # as if the run had been killed between the state and the weights
        self.addCleanup(os.chdir, os.getcwd())
        for folder, name in ((run / "checkpoints", "training_state.pt"), (run, ".")):
            os.chdir(folder)
            self.assert_resumed(name)
        self.assertTrue(same(weights, torch.load(file, weights_only=True)))
        if self.checkpoint.fcntl is None:
            self.skipTest("runs are not locked here")
        with self.checkpoint.locked(run):
            self.assert_refused(self.resume(run), 1, run, "in use")
        with mock.patch.object(self.checkpoint.fcntl, "flock", side_effect=OSError(38, "Function not implemented")):
            self.assertIn("cannot be locked", self.assert_resumed(run))
