"""Stopped and resumed runs."""

import itertools
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from unittest import mock

import torch

from tests.common import Stop, TrainGroup, run_contents, same
from training import run as runs

__unittest = True


class ResumeGroup(TrainGroup):
    """Shared by the groups on stopped runs."""

    needs = (*TrainGroup.needs, "training.checkpoint")

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
    """A stopped and resumed run equals an uninterrupted one."""

    STEPS = 2  # per epoch: 100 digits in batches of 64
    FLAGS = "--epochs", "4", "--drop_after", "1"

    def setUp(self):  # means of 7 steps are logged, so that the state has a part of all sums at one stop or another
        super().setUp()
        self.enterContext(mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", (7, None)))

    def stop_after(self, steps, name, *flags):
        """Train until a signal arrives after a number of steps; return the run's folder."""
        log_dir, step_done, count = self.folder(), runs.Run.step_done, itertools.count(1)
        signum = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGUSR1
        handler = signal.getsignal(signum)

        def signal_and_step_done(run):
            if next(count) == steps:
                signal.raise_signal(signum)
            step_done(run)

        with mock.patch.object(runs.Run, "step_done", signal_and_step_done):
            status, _, err = self.run_digits("--log_dir", log_dir, *flags)
        self.assertEqual(signal.getsignal(signum), handler, "the handler was not restored")
        self.assertEqual(status, 128 + signum, err)
        run, = log_dir.iterdir()
        epochs, rest = divmod(steps, self.STEPS)
        self.assertIn(f"by {signal.Signals(signum).name} after {epochs} epochs and {rest} steps; resume it with: "
                      f"python train.py --resume {run}\n", err)
        return run

    def test_a_run_stopped_by_a_signal_and_resumed_equals_the_uninterrupted_one(self):
        base = "--epochs", "2", "--networks", "base", "--posterior", "gaussian"
        universal = "--epochs", "2", "--posterior", "universal"
        for steps, name, flags in ((1, "SIGINT", self.FLAGS), (2, "SIGTERM", self.FLAGS), (7, "SIGUSR1", self.FLAGS),
                                   (3, "SIGTERM", base), (3, "SIGTERM", universal)):
            run = self.stop_after(steps, name, *flags)
            for _ in range(2):  # the second time, nothing is left to do
                self.assert_resumed(run)
                self.assert_same_contents(run, self.finished_run(*flags))
            settings = json.loads((run / "hparams.json").read_text())
            model = self.models.AdversarialAE(networks=settings["networks"], posterior=settings["posterior"])
            model.load_state_dict(torch.load(run / "checkpoints" / "model_checkpoint.pt", weights_only=True))

    def test_the_average_is_shown_measured_and_saved_and_training_uses_the_others(self):
        names = "generate_and_save", "save_reconstruction", "save_measurements", "save_summary"
        last, last_saved = self.train_quietly("--epochs", "1", "--averaging", "0")
        with mock.patch.multiple(self.train, **dict.fromkeys(names, mock.DEFAULT)) as functions:
            run, saved = self.train_quietly("--epochs", "1", "--averaging", "0.9")
        for name, function in functions.items():
            self.check(same(function.call_args.args[0].state_dict(), saved), f"{name} does not get the average")
        state, last_state = self.checkpoint.load_state(run), self.checkpoint.load_state(last)
        self.assertTrue(same(state["ema"]["weights"], saved))
        self.assertTrue(same(state["model"], last_state["model"]), "the weights depend on the average")
        self.assertTrue(same(last_state["model"], last_saved), "--averaging 0 averages")
        for name, weights in last_saved.items():
            self.assertEqual(torch.equal(weights, saved[name]), not weights.is_floating_point(), name)

    def test_a_run_ended_by_a_full_disk_then_extended_and_killed_is_resumed_from_its_checkpoint(self):
        log_dir, fsync = self.folder(), os.fsync

        def full(file):  # while the third state is written, after later events and pictures
            if all(any(log_dir.glob(f"*/checkpoints/{name}")) for name in (self.checkpoint.PREVIOUS, "*state.pt.tmp")):
                raise OSError(28, "No space left on device")
            fsync(file)

        with mock.patch("os.fsync", full):
            result = self.run_digits("--log_dir", log_dir, "--epochs", 2, "--drop_after", 1, "--checkpoint_every", 1)
        self.assert_refused(result, 1, "training_state.pt", "No space left")
        run, = log_dir.iterdir()
        self.assertEqual(list(run.rglob("*.tmp")), [])
        with mock.patch.object(self.train, "train_aae", side_effect=Stop), self.assertRaises(Stop):
            self.resume(run, "--epochs", 4)
        (run / "checkpoints" / "training_state.pt.tmp").write_bytes(b"half")
        self.assertEqual(self.checkpoint.load_state(run)["epoch"], 1)
        self.assert_resumed(run)
        self.assert_same_contents(run, self.finished_run(*self.FLAGS))
        self.assertEqual(list(run.rglob("*.tmp")), [])
        self.assertEqual(json.loads((run / "hparams.json").read_text())["epochs"], 4)
        group, = self.checkpoint.load_state(run)["optimizer_ae"]["param_groups"]
        self.check_close(group["lr"], 1e-4, "the learning rate does not drop after the epoch of --drop_after")

    def test_a_second_interrupt_stops_at_once_and_ignored_signals_stay_ignored(self):
        with runs.stop_signals() as pending_signals:
            signal.raise_signal(signal.SIGINT)
            self.assertEqual(pending_signals, [signal.SIGINT])
            with self.assertRaises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN))
        with runs.stop_signals() as pending_signals:
            signal.raise_signal(signal.SIGINT)
        self.assertEqual(pending_signals, [])

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

    def test_a_students_train_aae_is_trained_stopped_and_resumed(self):
        log_dir, trained, step = self.folder(), [], self.train.train_aae

        def train_aae(epoch, model, train_loader, *others):
            for number, batch in enumerate(train_loader, 1):
                step(epoch, model, [batch], *others)
                trained.append((epoch, number, len(train_loader)))
                if len(trained) == 3:
                    signal.raise_signal(signal.SIGTERM)

        with mock.patch.object(self.train, "train_aae", train_aae):
            status, _, err = self.run_digits("--log_dir", log_dir, *self.FLAGS)
            self.assertEqual(status, 128 + signal.SIGTERM, err)
            run, = log_dir.iterdir()
            self.assert_resumed(run)
        self.assertEqual(trained, [(1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 1, 2), (3, 1, 2), (3, 2, 2), (4, 1, 2),
                                   (4, 2, 2)])
        self.assert_same_contents(run, self.finished_run(*self.FLAGS))
