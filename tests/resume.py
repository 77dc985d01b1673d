"""Stopped and resumed runs."""

import contextlib
import copy
import io
import json
import signal
from functools import partial
from unittest import mock

import torch

from tests.common import Stop, TrainGroup, run_contents, same
from training import run as runs

__unittest = True


class ResumeGroup(TrainGroup):
    """Shared by the groups on stopped runs."""

    needs = (*TrainGroup.needs, "training.checkpoint")
    STEPS = 2  # per epoch: 100 digits in batches of 64

    def stop_after(self, steps, *flags, signum=signal.SIGTERM):
        """Train until a signal arrives after a number of steps; return the run's folder and the exception."""
        log_dir = self.folder()
        step_done, count = runs.Run.step_done, iter(range(1, 1000))

        def signal_and_step_done(run):
            if next(count) == steps:
                signal.raise_signal(signum)
            step_done(run)

        args = self.train.parse_args(["--dataset", "digits", "--no-cuda", "--log_dir", str(log_dir), *flags])
        with mock.patch.object(runs.Run, "step_done", signal_and_step_done), self.few_digits, \
                contextlib.redirect_stdout(io.StringIO()), self.assertRaises(self.cli.RunStopped) as caught:
            self.train.main(args)
        run, = log_dir.iterdir()
        return run, caught.exception

    def resume(self, run, *flags):
        with self.few_digits:
            return self.run_cli("--resume", run, *flags)

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

    def test_resumed_run_equals_the_uninterrupted_one(self):
        windows = (3, None)  # of 3 steps, so that one is incomplete at every stop
        with mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", windows):
            whole, _ = self.train_quietly("--epochs", "4", "--drop_after", "1")
            for steps in (1, 2, 5):  # within an epoch, at its end, within a later epoch
                run, stopped = self.stop_after(steps, "--epochs", "4", "--drop_after", "1")
                self.assertIn(f"after {steps // self.STEPS} epochs and {steps % self.STEPS} steps", str(stopped))
                for _ in range(2):  # the second time, nothing is left to do
                    self.assertEqual(self.resume(run)[0], 0)
                    self.assert_same_run(run, whole)

    def test_every_model_is_resumed(self):
        for flag, value, other in (("--networks", "base", "residual"), ("--posterior", "gaussian", "deterministic"),
                                   ("--posterior", "universal", "deterministic")):
            whole, weights = self.train_quietly("--epochs", "2", flag, value)
            self.models.AdversarialAE(**{flag.strip("-"): value}).load_state_dict(weights)
            run, _ = self.stop_after(3, "--epochs", "2", flag, value)
            self.assertEqual(self.resume(run, flag, other)[0], 2)
            self.assertEqual(self.resume(run)[0], 0)
            self.assert_same_run(run, whole)
            self.assertEqual(json.loads((run / "hparams.json").read_text())[flag.strip("-")], value)

    def test_saved_weights_are_averaged_and_training_uses_the_others(self):
        runs = {decay: self.train_quietly("--epochs", "3", "--averaging", decay) for decay in ("0", "0.9")}
        (last, last_saved), (averaged, averaged_saved) = runs.values()
        states = [self.checkpoint.load_state(run) for run in (last, averaged)]
        for name in states[0]["model"]:
            weights, others = (state["model"][name] for state in states)
            self.assertTrue(torch.equal(weights, others), f"{name} depends on the average")
            self.assertTrue(torch.equal(averaged_saved[name], states[1]["ema"]["weights"][name]), name)
            if weights.is_floating_point():
                self.assertTrue(torch.equal(last_saved[name], weights), f"{name} with --averaging 0")
                self.assertFalse(torch.equal(last_saved[name], averaged_saved[name]), f"{name} is not averaged")

    def test_pictures_and_measurements_are_of_the_average(self):
        names, seen = ("generate_and_save", "save_reconstruction", "save_measurements", "save_summary"), {}

        def record(name, model, *_, **__):
            seen[name] = copy.deepcopy(model.state_dict())

        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(mock.patch.object(self.train, name, side_effect=partial(record, name)))
            _, saved = self.train_quietly("--epochs", "5", "--averaging", "0.9")
        for name in names:
            self.assertTrue(same(seen[name], saved), f"{name} does not get the averaged weights")

    def test_extended_run_equals_a_longer_one(self):
        with mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", (3, None)):
            whole, _ = self.train_quietly("--epochs", "4")
            run, _ = self.train_quietly("--epochs", "2")
            self.assertEqual(self.resume(run, "--epochs", "4")[0], 0)
            self.assert_same_run(run, whole)
            self.assertEqual(json.loads((run / "hparams.json").read_text())["epochs"], 4)

    def test_killed_run_is_resumed_from_its_checkpoint(self):
        whole, _ = self.train_quietly("--epochs", "3", "--checkpoint_every", "1")
        log_dir = self.folder()
        save_state, count = self.checkpoint.save_state, iter(range(100))

        def save_and_die(*args):  # like a kill, after later events and pictures were written
            if next(count) in (2, 3):
                raise Stop
            save_state(*args)

        with mock.patch.object(self.checkpoint, "save_state", save_and_die), self.few_digits:
            with self.assertRaises(Stop):
                self.run_cli("--dataset", "digits", "--no-cuda", "--epochs", 3, "--checkpoint_every", 1,
                             "--log_dir", log_dir)
            run, = log_dir.iterdir()
            with self.assertRaises(Stop):
                self.run_cli("--resume", run)
        (run / "checkpoints" / "training_state.pt.tmp").write_bytes(b"half")
        self.assertEqual(self.checkpoint.load_state(run)["epoch"], 1)
        self.assertEqual(self.resume(run)[0], 0)
        self.assert_same_run(run, whole)
        self.assertEqual(list(run.rglob("*.tmp")), [])

    def test_signals_have_their_exit_status_and_the_command_to_resume(self):
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if not hasattr(signal, name):
                continue
            signum = getattr(signal, name)
            before = signal.getsignal(signum)
            run, stopped = self.stop_after(1, "--epochs", "2", signum=signum)
            self.assertEqual(signal.getsignal(signum), before, "the handler was not restored")
            with mock.patch.object(self.train, "main", side_effect=stopped):
                status, _, err = self.run_cli()
            self.assertEqual(status, 128 + signum)
            self.assertRegex(err, f"{name} after 0 epochs and 1 steps; resume it with: "
                                  f"python .*train.py --resume {run}")

    def test_signal_after_the_last_step_of_an_epoch(self):
        log_dir, describe = self.folder(), runs.describe

        def signal_late(means):  # called for the line that is printed after an epoch's last step
            signal.raise_signal(signal.SIGTERM)
            return describe(means)

        with mock.patch.object(runs, "describe", signal_late), self.few_digits:
            status, _, err = self.run_cli("--dataset", "digits", "--epochs", 3, "--no-cuda", "--log_dir", log_dir)
        run, = log_dir.iterdir()
        state = self.checkpoint.load_state(run)
        self.assertEqual(status, 128 + signal.SIGTERM)
        self.assertIn(f"after {state['epoch']} epochs and {state['steps']} steps", err)

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

    def test_more_epochs_survive_a_kill(self):
        run, _ = self.train_quietly("--epochs", "2")
        with mock.patch.object(self.train, "train_aae", side_effect=Stop), self.assertRaises(Stop):
            self.resume(run, "--epochs", 3)
        self.assertEqual(self.resume(run)[0], 0)
        self.assertEqual(self.checkpoint.load_state(run)["epoch"], 3)

    def test_files_of_the_user_are_kept(self):
        run, _ = self.stop_after(3, "--epochs", "2")
        foreign = [run / name for name in (
            "events.notes", "events.out.tfevents.mine", "old/events.out.tfevents.1700000000.host.1.0", "x.tmp",
            "results/Prior_samples/samples_epoch_99.png", "checkpoints/best.pt", "00002/codes/mine.tsv")]
        for file in foreign:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(file))
        late = run / "events.out.tfevents.9999999999.host.1.0"
        late.write_bytes(b"half")
        for flags in ((), ("--epochs", "3")):  # to the end, with more epochs
            self.assertEqual(self.resume(run, *flags)[0], 0)
            self.assertEqual([file for file in foreign if not file.is_file() or file.read_text() != str(file)], [])
        self.assertFalse(late.exists(), "events newer than the checkpoint remain")

    def test_a_students_train_aae_is_trained_stopped_and_resumed(self):
        trained = []

        def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, lambda_=1):
            for number, (x, _) in enumerate(train_loader, 1):
                values = self.train.train_step(model, optimizer_ae, optimizer_disc, lambda_, x)
                logger_ae.add_values(values[0])
                logger_disc.add_values(values[1])
                trained.append((epoch, number, len(train_loader)))
                if len(trained) == 3:
                    signal.raise_signal(signal.SIGTERM)

        log_dir = self.folder()
        with mock.patch.object(self.train, "train_aae", train_aae), self.few_digits:
            status, _, err = self.run_cli("--dataset", "digits", "--no-cuda", "--epochs", 3, "--log_dir", log_dir)
            self.assertEqual(status, 128 + signal.SIGTERM, err)
            run, = log_dir.iterdir()
            status, out, err = self.run_cli("--resume", run)
        self.assertEqual((status, err), (0, ""))
        self.assertEqual(trained, [(1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 1, 2), (3, 1, 2), (3, 2, 2)])
        self.assertIn("recon_loss", out)
        whole, _ = self.train_quietly("--epochs", "3")
        for name in ("model", "ema", "optimizer_ae", "optimizer_disc"):
            states = [self.checkpoint.serialize(self.checkpoint.load_state(folder)[name]) for folder in (run, whole)]
            self.assertEqual(*states, f"{name} differs from that of our train_aae")

    def test_a_model_without_a_sample_stream_is_resumed(self):
        run, _ = self.train_quietly("--epochs", "1")

        class Plain(self.models.AdversarialAE):
            def __init__(self, z_dim):
                super().__init__(z_dim)
                del self.sample_stream

            def sample(self, batch_size):
                return self.decoder(torch.randn(batch_size, self.z_dim))

        with mock.patch.object(self.train, "AdversarialAE", Plain):
            self.assertEqual(self.resume(run, "--epochs", 2)[0], 0)
