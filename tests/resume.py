"""Stopped and resumed runs."""

import copy
import json
import shutil
import signal
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from tests.common import Stop, TrainGroup, run_contents, same
from training import run as runs

__unittest = True


class ResumeGroup(TrainGroup):
    """Shared by the groups on stopped runs."""

    needs = (*TrainGroup.needs, "training.checkpoint")
    STEPS = 2  # per epoch: 100 digits in batches of 64

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

    def start(self, log_dir, *flags):
        """Start a run on 100 digits in `log_dir`; return its exit status, standard output and standard error."""
        with self.few_digits:
            return self.run_cli("--dataset", "digits", "--no-cuda", "--log_dir", log_dir, *flags)

    def stop_after(self, steps, *flags, signum=signal.SIGTERM):
        """Train until a signal arrives after a number of steps; return the run's folder."""
        log_dir, step_done, count = self.folder(), runs.Run.step_done, iter(range(1, 1000))

        def signal_and_step_done(run):
            if next(count) == steps:
                signal.raise_signal(signum)
            step_done(run)

        with mock.patch.object(runs.Run, "step_done", signal_and_step_done):
            status, _, err = self.start(log_dir, *flags)
        run, = log_dir.iterdir()
        self.assertEqual(status, 128 + signum, err)
        self.assertRegex(err, rf"{signal.Signals(signum).name} after {steps // self.STEPS} epochs and "
                              rf"{steps % self.STEPS} steps; resume it with: python train.py --resume {run}\n\Z")
        return run

    def resume(self, run, *flags):
        with self.few_digits:
            return self.run_cli("--resume", run, *flags)

    def assert_resumed(self, run, *flags):
        result = self.resume(run, *flags)
        self.assertEqual(result[0], 0, result[2])

    def assert_same_run(self, run, other):
        self.assert_same_contents(run_contents(run), run_contents(other))

    def assert_same_contents(self, contents, others):
        differing = sorted(name for name in contents.keys() | others.keys() if contents.get(name) != others.get(name))
        self.check(not differing, f"the runs differ in {differing[:10]}")

    def assert_refused(self, result, status, *fragments):
        self.assertEqual(result[0], status, result[2])
        self.assertEqual(len(result[2].strip().splitlines()), 1, result[2])
        for fragment in fragments:
            self.assertIn(str(fragment), result[2])


class Resume(ResumeGroup):
    """A stopped and resumed run equals an uninterrupted one."""

    DROP = "--drop_after", "1"  # of the learning rate
    FLAGS = "--epochs", "4", *DROP

    def setUp(self):  # means of 7 steps are logged, so that the state has a part of all sums at one stop or another
        super().setUp()
        self.enterContext(mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", (7, None)))

    def test_resumed_run_equals_the_uninterrupted_one(self):
        for steps in (1, 2, 7):  # within an epoch, at its end, within the last epoch
            run = self.stop_after(steps, *self.FLAGS)
            for _ in range(2):  # the second time, nothing is left to do
                self.assert_resumed(run)
                self.assert_same_run(run, self.finished_run(*self.FLAGS))

    def test_every_model_is_resumed(self):
        for options in ({"networks": "base", "posterior": "gaussian"}, {"posterior": "universal"}):
            flags = [part for name, value in options.items() for part in (f"--{name}", value)]
            whole, weights = self.train_quietly("--epochs", "2", *flags)
            self.models.AdversarialAE(**options).load_state_dict(weights)
            run = self.stop_after(3, "--epochs", "2", *flags)
            for name in options:
                other = "residual" if name == "networks" else "deterministic"
                self.assert_refused(self.resume(run, f"--{name}", other), 2, f"--{name} {other} contradicts")
            self.assert_resumed(run)
            self.assert_same_run(run, whole)
            self.assertEqual(options.items() - json.loads((run / "hparams.json").read_text()).items(), set())

    def test_the_average_is_shown_measured_and_saved_and_training_uses_the_others(self):
        names, seen = ("generate_and_save", "save_reconstruction", "save_measurements", "save_summary"), {}

        def record(name, model, *_, **__):
            seen[name] = copy.deepcopy(model.state_dict())

        last, last_saved = self.train_quietly("--epochs", "1", "--averaging", "0")
        with mock.patch.multiple(self.train, **{name: partial(record, name) for name in names}):
            averaged, averaged_saved = self.train_quietly("--epochs", "1", "--averaging", "0.9")
        states = [self.checkpoint.load_state(run) for run in (last, averaged)]
        for name in names:
            self.assertTrue(same(seen[name], averaged_saved), f"{name} does not get the averaged weights")
        self.assertTrue(same(states[1]["ema"]["weights"], averaged_saved))
        self.assertTrue(same(states[0]["model"], states[1]["model"]), "the weights depend on the average")
        for name, weights in states[0]["model"].items():
            if weights.is_floating_point():
                self.assertTrue(torch.equal(last_saved[name], weights), f"{name} with --averaging 0")
                self.assertFalse(torch.equal(last_saved[name], averaged_saved[name]), f"{name} is not averaged")

    def test_extended_run_equals_a_longer_one_even_after_a_kill(self):
        run = self.finished_run("--epochs", "2", *self.DROP)
        with mock.patch.object(self.train, "train_aae", side_effect=Stop), self.assertRaises(Stop):
            self.resume(run, "--epochs", 4)
        self.assert_resumed(run)
        self.assert_same_run(run, self.finished_run(*self.FLAGS))
        self.assertEqual(json.loads((run / "hparams.json").read_text())["epochs"], 4)

    def test_killed_run_is_resumed_from_its_checkpoint(self):
        log_dir, save_state, count = self.folder(), self.checkpoint.save_state, iter(range(100))

        def save_and_die(*args):  # like a kill, after later events and pictures were written
            if next(count) in (2, 3):
                raise Stop
            save_state(*args)

        with mock.patch.object(self.checkpoint, "save_state", save_and_die):
            with self.assertRaises(Stop):
                self.start(log_dir, *self.FLAGS, "--checkpoint_every", 1)
            run, = log_dir.iterdir()
            with self.assertRaises(Stop):
                self.resume(run)
        (run / "checkpoints" / "training_state.pt.tmp").write_bytes(b"half")
        self.assertEqual(self.checkpoint.load_state(run)["epoch"], 1)
        self.assert_resumed(run)
        self.assert_same_run(run, self.finished_run(*self.FLAGS))
        self.assertEqual(list(run.rglob("*.tmp")), [])

    def test_every_signal_stops_a_run_and_its_handler_is_restored(self):
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if signum := getattr(signal, name, None):
                before = signal.getsignal(signum)
                self.stop_after(1, "--epochs", "2", signum=signum)
                self.assertEqual(signal.getsignal(signum), before, "the handler was not restored")

    def test_ignored_signals_stay_ignored(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        with runs.stop_signals() as pending_signals:
            signal.raise_signal(signal.SIGINT)
        self.assertEqual(pending_signals, [])

    def test_second_interrupt_stops_at_once(self):
        with runs.stop_signals() as pending_signals:
            signal.raise_signal(signal.SIGINT)
            self.assertEqual(pending_signals, [signal.SIGINT])
            with self.assertRaises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    def test_files_of_the_user_are_kept(self):
        run = self.finished_run("--epochs", "2", *self.DROP)
        foreign = [run / name for name in (
            "events.notes", "events.out.tfevents.mine", "old/events.out.tfevents.1700000000.host.1.0", "x.tmp",
            "results/Prior_samples/samples_epoch_99.png", "checkpoints/best.pt", "00002/codes/mine.tsv")]
        for file in foreign:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(file))
        late = run / "events.out.tfevents.9999999999.host.1.0"
        late.write_bytes(b"half")
        for flags in ((), ("--epochs", "3")):  # with nothing left to do, with more epochs
            self.assert_resumed(run, *flags)
            self.assertEqual([file for file in foreign if not file.is_file() or file.read_text() != str(file)], [])
        self.assertFalse(late.exists(), "events newer than the checkpoint remain")

    def test_a_students_train_aae_is_trained_stopped_and_resumed(self):
        log_dir, trained = self.folder(), []

        def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
            for number, (x, _) in enumerate(train_loader, 1):
                values = self.train.train_step(model, optimizer_ae, optimizer_disc, lambda_, x)
                logger_ae.add_values(values[0])
                logger_disc.add_values(values[1])
                trained.append((epoch, number, len(train_loader)))
                if len(trained) == 3:
                    signal.raise_signal(signal.SIGTERM)

        with mock.patch.object(self.train, "train_aae", train_aae):
            status, _, err = self.start(log_dir, *self.FLAGS)
            self.assertEqual(status, 128 + signal.SIGTERM, err)
            run, = log_dir.iterdir()
            self.assert_resumed(run)
        self.assertEqual(trained, [(1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 1, 2), (3, 1, 2), (3, 2, 2), (4, 1, 2),
                                   (4, 2, 2)])
        self.assert_same_run(run, self.finished_run(*self.FLAGS))
