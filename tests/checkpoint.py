"""Training states: damaged ones, and what cannot be resumed."""

import os
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from tests.common import run_contents, same
from tests.resume import ResumeGroup

__unittest = True


class Checkpoint(ResumeGroup):
    """Training states that are damaged, of another version, or of another run; full disks and locks."""

    def test_latest_run_is_the_one_saved_last_whatever_its_name(self):
        log_dir = self.folder()
        for name in ("z20", "a"):
            self.finished_run("--epochs", "1").rename(log_dir / name)
        (log_dir / "2999_01_01_00_00_00").mkdir()  # has no checkpoint

        def latest():
            return self.resume("latest", "--log_dir", log_dir)

        self.assertIn(f"run:    {log_dir / 'a'}", latest()[1])
        self.assertEqual(self.resume(log_dir / "z20", "--epochs", 2)[0], 0)
        self.assertIn(f"run:    {log_dir / 'z20'}", latest()[1])
        (log_dir / "z20" / "checkpoints" / "training_state.pt").write_bytes(b"half")
        self.assert_refused(latest(), 1, log_dir / "z20", "is damaged")

    def test_contradicting_flags_are_rejected_by_name(self):
        run = self.finished_run("--epochs", "2")
        before = run_contents(run)
        for flag, value in (("--z_dim", 3), ("--batch_size", 32), ("--lambda_", 1), ("--ae_lr", 0.1), ("--d_lr", 0.1),
                            ("--seed", 1), ("--dataset", "auto"), ("--epochs", 1), ("--networks", "base"),
                            ("--posterior", "gaussian")):
            self.assert_refused(self.resume(run, flag, value), 2, flag)
        self.assert_resumed(run, "--z_dim", 8, "--num_workers", 2)
        self.assert_contents(run, before)

    def test_what_cannot_be_resumed(self):
        run = self.finished_run("--epochs", "1")
        empty, file = self.folder(), self.folder() / "training_state.pt"
        file.write_bytes(b"")
        for wrong in (empty, empty / "none", file, run / "checkpoints" / "model_checkpoint.pt", "latest"):
            named = empty if wrong == "latest" else wrong
            self.assert_refused(self.run_cli("--resume", wrong, "--log_dir", empty), 1, named)
        self.assert_refused(self.run_cli("--resume", "", "--log_dir", empty), 1, "cannot be resumed")
        for place in ("builtins.open", "os.truncate"):  # a run of somebody else; on Windows, one that is being read
            next(run.glob("events.out.*")).open("ab").write(b"later")
            with mock.patch(place, side_effect=PermissionError(13, "Permission denied", str(run / "x"))):
                self.assert_refused(self.resume(run), 1, run, "Permission denied")
        self.change(run, format="adversarial autoencoder, training state 1")
        self.assert_refused(self.resume(run), 1, run / "checkpoints" / "training_state.pt", "of this version")

    def change(self, run, **entries):
        """Replace entries of a run's training state."""
        file = run / "checkpoints" / "training_state.pt"
        file.write_bytes(self.checkpoint.serialize({**torch.load(file, weights_only=True), **entries}))

    def test_damaged_checkpoint_is_rejected_and_the_previous_one_offered(self):
        run, _ = self.train_quietly("--epochs", "2", "--checkpoint_every", "1")
        whole, current = run_contents(run), run / "checkpoints" / "training_state.pt"
        previous, content = current.with_name("training_state.previous.pt"), current.read_bytes()
        random = np.random.default_rng(0)
        weights = self.checkpoint.serialize(self.models.AdversarialAE().state_dict())
        damages = [content[:random.integers(len(content))], b"", b"not a checkpoint", weights]
        for place in random.integers(len(content) // 4, len(content) // 2, 4):  # among the data of tensors
            damages.append(content[:place] + bytes([content[place] ^ 1 << random.integers(8)]) + content[place + 1:])
        for damage in damages:
            current.write_bytes(damage)
            self.assert_refused(self.resume(run), 1, current, f"--resume {previous}")
        self.assertEqual(self.checkpoint.load_state(previous)["epoch"], 1)
        self.assert_resumed(previous)
        self.assert_contents(run, whole)
        previous.write_bytes(b"")
        current.write_bytes(b"")
        self.assert_refused(self.resume(run), 1, current)

    def test_checkpoint_of_another_model_or_optimizer(self):
        run = self.finished_run("--epochs", "1")
        before = run_contents(run)

        class Wider(self.models.AdversarialAE):
            def __init__(self, z_dim):
                super().__init__(z_dim)
                self.encoder.extra = nn.Linear(2, 2)

        class Plain(self.models.AdversarialAE):  # with the same weights, but without a stream for samples
            def __init__(self, z_dim):
                super().__init__(z_dim)
                del self.sample_stream

            def sample(self, batch_size):
                return self.decoder(torch.randn(batch_size, self.z_dim))

        with mock.patch.object(self.train, "AdversarialAE", Wider):
            self.assert_refused(self.resume(run), 1, run, "does not fit models.py")
        with mock.patch("torch.optim.Adam", lambda weights, lr, **_: torch.optim.RMSprop(weights, lr)):
            self.assert_refused(self.resume(run), 1, run, "RMSprop")
        self.assert_contents(run, before)
        with mock.patch.object(self.train, "AdversarialAE", Plain):
            self.assert_resumed(run, "--epochs", 2)

    def test_state_of_another_device_and_version(self):
        run = self.finished_run("--epochs", "1")
        state = self.checkpoint.load_state(run)
        for moments in state["optimizer_ae"]["state"].values():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = moments[name].contiguous()  # the layout on CUDA
        del state["settings"]["precision"]  # as if the flag were newer than the run
        self.change(run, optimizer_ae=state["optimizer_ae"], settings={**state["settings"], "device": "cuda"},
                    random={**state["random"], "device": torch.zeros(16, dtype=torch.uint8)})
        status, _, err = self.resume(run, "--epochs", 2)
        self.assertEqual(status, 0)
        self.assertIn("began with cuda and continues with cpu", err)
        self.assert_same_run(run, self.finished_run("--epochs", "2"))

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
            status, _, err = self.resume(run)
        self.assertEqual(status, 0)
        self.assertIn("cannot be locked", err)

    def test_full_disk_leaves_the_last_checkpoint(self):
        log_dir, fsync = self.folder(), os.fsync

        def full(file):  # while a second training state is written
            if all(any(log_dir.glob(f"*/checkpoints/training_state.pt{ending}")) for ending in ("", ".tmp")):
                raise OSError(28, "No space left on device")
            fsync(file)

        with mock.patch("os.fsync", full):
            self.assert_refused(self.run_digits("--log_dir", log_dir, "--epochs", 2, "--checkpoint_every", 1), 1, "training_state.pt",
                                "No space left")
        run, = log_dir.iterdir()
        self.assertEqual(self.checkpoint.load_state(run)["epoch"], 0)
        self.assertEqual(list(run.rglob("*.tmp")), [])
        self.assert_resumed(run)
        self.assert_same_run(run, self.finished_run("--epochs", "2"))

    def test_removed_run_folder_is_reported_and_not_created_again(self):
        log_dir, generate_and_save = self.folder(), self.train.generate_and_save

        def remove_folder(model, epoch, writer):
            if epoch:
                os.rename(writer.log_dir, log_dir / "elsewhere")
            generate_and_save(model, epoch, writer)

        with mock.patch.object(self.train, "generate_and_save", remove_folder):
            self.assert_refused(self.run_digits("--log_dir", log_dir, "--epochs", 2), 1, log_dir, "No such file")
        self.assertEqual([folder.name for folder in log_dir.iterdir()], ["elsewhere"])
