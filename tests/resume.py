"""Interrupted and resumed runs, and their training states."""

import functools
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._pytree import tree_map

from tests.common import Stop, TrainGroup, run_contents, same
from training import files
from training import run as runs
from unittests import HERE

__unittest = True


class ResumeGroup(TrainGroup):
    """Shared by the groups on stopped runs."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.trained, cls.trained_in = {}, Path(cls.enterClassContext(tempfile.TemporaryDirectory()))

    def finished_run(self, *flags):
        """Return a copy of the run with these flags, which is trained once for all tests of a group."""
        if flags not in self.trained:
            run, _ = self.train_quietly(*flags)
            self.trained[flags] = shutil.copytree(run, self.trained_in / str(len(self.trained)))
        return shutil.copytree(self.trained[flags], self.folder() / "run", copy_function=shutil.copy)

    def resume(self, run, *flags):
        with self.few_digits:
            return self.run_cli("--resume", run, *flags)

    def assert_resumed(self, run, *flags):
        """Resume a run to its end; return standard error."""
        status, _, err = self.resume(run, *flags)
        self.assertEqual(status, 0, err)
        return err

    def assert_same_contents(self, run, other):
        """Compare a run with the contents of another, or of itself before."""
        contents, others = run_contents(run), other if isinstance(other, dict) else run_contents(other)
        differing = [name for name in contents | others if contents.get(name) != others.get(name)]
        self.check(not differing, f"the runs differ in {differing[:10]}")


class Resume(ResumeGroup):
    """A resumed run ends with the bits of one that was never interrupted."""

    STEPS = 2  # per epoch: 100 digits in batches of 64
    FLAGS = "--epochs", "4", "--drop_after", "1"

    def setUp(self):  # means of 7 steps are logged, so that windows cross the ends of epochs
        super().setUp()
        self.enterContext(mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", (7, None)))

    def interrupted_run(self, steps, *flags):
        """Train until Ctrl-C is pressed after a number of steps; return the run's folder and standard error."""
        log_dir, step_done, count = self.folder(), runs.Run.step_done, itertools.count(1)

        def interrupt(run):
            step_done(run)
            if next(count) == steps:
                raise KeyboardInterrupt

        with mock.patch.object(runs.Run, "step_done", interrupt):
            status, _, err = self.run_digits("--log_dir", log_dir, *flags)
        self.assertEqual(status, 130, err)
        run, = log_dir.iterdir()
        return run, err

    def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one(self):
        base = "--epochs", "2", "--networks", "base", "--posterior", "gaussian"
        universal = "--epochs", "2", "--posterior", "universal"
        for steps, every, saved, flags in ((1, 1, 0, self.FLAGS), (5, 1, 2, self.FLAGS), (6, 2, 2, self.FLAGS),
                                           (3, 1, 1, base), (4, 1, 1, universal)):
            run, err = self.interrupted_run(steps, "--checkpoint_every", every, *flags)
            self.assertEqual(err, f"\ninterrupted; epoch {saved} is saved; resume the run with: python "
                                  f"{os.path.relpath(HERE / 'train.py')} --resume {run}\n")
            for _ in range(2):  # the second time, nothing is left to do
                self.assert_resumed(run)
                self.assert_same_contents(run, self.finished_run(*flags))
            settings = json.loads((run / "hparams.json").read_text())
            model = self.models.AdversarialAE(networks=settings["networks"], posterior=settings["posterior"])
            model.load_state_dict(torch.load(run / "checkpoints" / "model_checkpoint.pt", weights_only=True))

    def test_an_interrupt_before_anything_is_saved_or_in_a_folder_that_is_gone(self):
        for place, words in (("train.generate_and_save", "interrupted; nothing is saved yet, so start a new run"),
                             ("train.train_aae", f"epoch 0 is saved; resume the run with: python {runs.TRAIN} --res")):
            with mock.patch(place, side_effect=KeyboardInterrupt), \
                    mock.patch("os.path.relpath", side_effect=FileNotFoundError(2, "No such file or directory")):
                status, _, err = self.run_digits("--log_dir", self.folder(), "--epochs", 1)
            self.assertEqual(status, 130, err)
            self.assertIn(words, err)

    def test_the_average_is_shown_measured_and_saved_and_training_uses_the_others(self):
        names = "generate_and_save", "save_reconstruction", "save_measurements", "save_summary"
        last, last_saved = self.train_quietly("--epochs", "1", "--averaging", "0")
        with mock.patch.multiple(self.train, **dict.fromkeys(names, mock.DEFAULT)) as functions:
            run, saved = self.train_quietly("--epochs", "1", "--averaging", "0.9")
        for name, function in functions.items():
            self.check(same(function.call_args.args[0].state_dict(), saved), f"{name} does not get the average")
        state, last_state = runs.load_state(run), runs.load_state(last)
        self.assertTrue(same(state["ema"]["weights"], saved))
        self.assertTrue(same(state["model"], last_state["model"]), "the weights depend on the average")
        self.assertTrue(same(last_state["model"], last_saved), "--averaging 0 averages")
        for name, weights in last_saved.items():
            self.assertEqual(torch.equal(weights, saved[name]), not weights.is_floating_point(), name)

    def test_a_run_ended_by_a_full_disk_then_extended_and_killed_is_resumed_from_its_checkpoint(self):
        log_dir, fsync = self.folder(), os.fsync

        def full(file):  # while the third state is written, after later events and pictures
            if all(any(log_dir.rglob(name)) for name in ("samples_epoch_2.png", "training_state.pt.tmp")):
                raise OSError(28, "No space left on device")
            fsync(file)

        with mock.patch("os.fsync", full):
            result = self.run_digits("--log_dir", log_dir, "--epochs", 2, "--drop_after", 1)
        self.assert_refused(result, 1, "training_state.pt", "No space left")
        run, = log_dir.iterdir()
        self.assertEqual(list(run.rglob("*.tmp")), [])
        with mock.patch.object(self.train, "train_aae", side_effect=Stop), self.assertRaises(Stop):
            self.resume(run, "--epochs", 4)
        (run / "checkpoints" / "training_state.pt.tmp").write_bytes(b"half")
        self.assertEqual(runs.load_state(run)["run"]["epoch"], 1)
        self.assert_resumed(run)
        self.assert_same_contents(run, self.finished_run(*self.FLAGS))
        self.assertEqual(list(run.rglob("*.tmp")), [])
        self.assertEqual(json.loads((run / "hparams.json").read_text())["epochs"], 4)
        group, = runs.load_state(run)["optimizer_ae"]["param_groups"]
        self.check_close(group["lr"], 1e-4, "the learning rate does not drop after the epoch of --drop_after")

    def test_files_of_the_user_are_kept(self):
        run = self.finished_run(*self.FLAGS)
        foreign = [run / name for name in (
            "events.notes", "events.out.tfevents.mine", "old/events.out.tfevents.1700000000.host.1.0", "x.tmp",
            "results/Prior_samples/samples_epoch_99.png", "checkpoints/best.pt", "00002/codes/mine.tsv")]
        for file in foreign:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(file))
        late = run / "events.out.tfevents.9999999999.host.1.0"
        late.write_bytes(b"half")
        for flags in ((), ("--epochs", "5")):  # with nothing left to do, with more epochs
            self.assert_resumed(run, *flags)
            self.assertEqual([file for file in foreign if not file.is_file() or file.read_text() != str(file)], [])
        self.assertFalse(late.exists(), "events newer than the checkpoint remain")

    def test_a_students_train_aae_is_trained_and_resumed(self):
        trained, step = [], self.train.train_aae

        def train_aae(epoch, model, train_loader, *others):
            for number, batch in enumerate(train_loader, 1):
                step(epoch, model, [batch], *others)
                trained.append((epoch, number, len(train_loader)))

        with mock.patch.object(self.train, "train_aae", train_aae):
            run, _ = self.interrupted_run(3, *self.FLAGS)
            self.assert_resumed(run)
        self.assertEqual(trained, [(1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 1, 2), (2, 2, 2), (3, 1, 2), (3, 2, 2),
                                   (4, 1, 2), (4, 2, 2)])
        self.assert_same_contents(run, self.finished_run(*self.FLAGS))


class Checkpoint(ResumeGroup):
    """Training states that are damaged, of another version, or of another run; full disks and locks."""

    def change(self, run, **entries):
        file = run / "checkpoints" / "training_state.pt"
        file.write_bytes(files.serialize({**torch.load(file, weights_only=True), **entries}))

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
                             (run / "checkpoints" / "model_checkpoint.pt", "model_checkpoint.pt"), ("", ".")):
            self.assert_refused(self.run_cli("--resume", wrong, "--log_dir", empty), 1, named, "resume")
        for place in ("builtins.open", "os.truncate"):  # a run of somebody else; on Windows, one that is being read
            with next(run.glob("events.out.*")).open("ab") as events:
                events.write(b"later")
            with mock.patch(place, side_effect=PermissionError(13, "Permission denied", str(run / "x"))):
                self.assert_refused(self.resume(run), 1, run, "Permission denied")
        self.change(run, format="adversarial autoencoder, training state 3")
        self.assert_refused(self.resume(run), 1, run / "checkpoints" / "training_state.pt", "finish the run with")

    def test_damaged_states_are_rejected(self):
        run = self.finished_run("--epochs", "1")
        state = run / "checkpoints" / "training_state.pt"
        content = state.read_bytes()
        damages = [content[:-100], b"", b"not a checkpoint"]
        for place in np.linspace(len(content) // 4, len(content) // 2, 4, dtype=int):  # among the data of tensors
            damages.append(content[:place] + bytes([content[place] ^ 16]) + content[place + 1:])  # one bit
        for damage in damages:
            state.write_bytes(damage)
            self.assert_refused(self.resume(run), 1, f"{state} is damaged, or not a checkpoint; name another file\n")

    def test_checkpoint_of_another_model_or_optimizer(self):
        run = self.finished_run("--epochs", "1")
        before = run_contents(run)

        base = functools.partial(self.models.AdversarialAE, networks="base")
        with mock.patch("training.model.AdversarialAE", base):
            self.assert_refused(self.resume(run), 1, run, "does not fit models.py")
        with mock.patch("torch.optim.Adam", lambda weights, lr, **_: torch.optim.RMSprop(weights, lr)):
            self.assert_refused(self.resume(run), 1, run, "RMSprop")
        full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        with mock.patch("torch.optim.Adam.load_state_dict", side_effect=full):
            self.assert_refused(self.resume(run), 1, "the GPU does not have enough free memory")
        self.assert_same_contents(run, before)

    def test_state_of_another_device_and_version(self):
        run = self.finished_run("--epochs", "1")
        state = runs.load_state(run)
        cuda_layout = tree_map(lambda part: part.contiguous() if torch.is_tensor(part) else part, state["optimizer_ae"])
        del state["settings"]["precision"]  # as if the flag were newer than the run
        self.change(run, optimizer_ae=cuda_layout, settings={**state["settings"], "device": "cuda"},
                    random={**state["random"], "cuda": torch.zeros(16, dtype=torch.uint8)})
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
        if files.fcntl is None:
            self.skipTest("runs are not locked here")
        with files.locked(run):
            self.assert_refused(self.resume(run), 1, run, "in use")
        with mock.patch.object(files.fcntl, "flock", side_effect=OSError(38, "Function not implemented")):
            self.assertIn("cannot be locked", self.assert_resumed(run))
