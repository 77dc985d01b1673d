"""Runs that are stopped and resumed."""

import contextlib
import copy
import io
import json
import os
import signal
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from tests.common import Stop, run_contents, TrainGroup
from unittests import same

__unittest = True


class Resume(TrainGroup):
    """Runs that are stopped, and go on as if they had not been."""

    needs = ("train", "mnist", "models", "checkpoint")
    STEPS = 2  # of an epoch of a hundred digits in batches of 64

    def stop_after(self, steps, *flags, signum=signal.SIGTERM):
        """Train until a signal comes right after so many steps; return the run's folder and what was raised."""
        log_dir = self.folder()
        add, count = self.train.StepLog.add, iter(range(1, 1000))

        def add_and_stop(log, *values):
            add(log, *values)
            if next(count) == steps:
                signal.raise_signal(signum)

        with mock.patch.object(self.train.StepLog, "add", add_and_stop), self.assertRaises(self.train.RunStopped) as caught:
            with self.few_digits, contextlib.redirect_stdout(io.StringIO()):
                self.train.main(self.train.parse_args(["--dataset", "digits", "--no-cuda", "--log_dir", str(log_dir), *flags]))
        run, = log_dir.iterdir()
        return run, caught.exception

    def go_on(self, run, *flags):
        with self.few_digits:
            return self.run_cli("--resume", run, *flags)

    def assert_same_run(self, run, other):
        self.assert_same_contents(run_contents(run), run_contents(other))

    def assert_same_contents(self, contents, others):
        differing = sorted(name for name in contents.keys() | others.keys() if contents.get(name) != others.get(name))
        self.check(not differing, f"the runs differ in {differing[:10]}")

    def test_resumed_run_is_the_uninterrupted_one(self):
        with mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", (3, None)):  # windows across every stop
            whole, _ = self.train_quietly("--epochs", "4", "--drop_after", "1")
            for steps in (1, 2, 5):  # within an epoch, at its end, and within a later one
                run, stopped = self.stop_after(steps, "--epochs", "4", "--drop_after", "1")
                self.assertIn(f"after {steps // self.STEPS} epochs and {steps % self.STEPS} steps", str(stopped))
                for _ in range(2):  # the second time there is nothing left to do
                    self.assertEqual(self.go_on(run)[0], 0)
                    self.assert_same_run(run, whole)

    def test_rate_of_an_older_run_stays(self):
        run, _ = self.stop_after(2, "--epochs", "2")
        path = run / "checkpoints" / "training_state.pt"
        state = torch.load(path, weights_only=True)
        del state["settings"]["drop_after"]
        torch.save(state, path)
        self.assertEqual(self.go_on(run)[0], 0)
        self.assertEqual(json.loads((run / "hparams.json").read_text())["drop_after"], 0)

    def test_base_networks_are_resumed(self):
        whole, weights = self.train_quietly("--epochs", "2", "--networks", "base")
        self.models.AdversarialAE(networks="base").load_state_dict(weights)
        run, _ = self.stop_after(3, "--epochs", "2", "--networks", "base")
        self.assertEqual(self.go_on(run, "--networks", "residual")[0], 2)
        self.assertEqual(self.go_on(run)[0], 0)
        self.assert_same_run(run, whole)

    def test_every_posterior_is_resumed(self):
        for posterior in ("gaussian", "universal"):
            whole, weights = self.train_quietly("--epochs", "2", "--posterior", posterior)
            self.models.AdversarialAE(posterior=posterior).load_state_dict(weights)
            run, _ = self.stop_after(3, "--epochs", "2", "--posterior", posterior)
            self.assertEqual(self.go_on(run, "--posterior", "deterministic")[0], 2)
            self.assertEqual(self.go_on(run)[0], 0)
            self.assert_same_run(run, whole)
            self.assertEqual(json.loads((run / "hparams.json").read_text())["posterior"], posterior)

    def test_saved_weights_are_the_average_and_training_goes_on_with_the_others(self):
        runs = {decay: self.train_quietly("--epochs", "3", "--averaging", decay) for decay in ("0", "0.9")}
        (last, last_saved), (averaged, averaged_saved) = runs.values()
        states = [self.checkpoint.load_state(run) for run in (last, averaged)]
        for name in states[0]["model"]:
            self.assertTrue(torch.equal(states[0]["model"][name], states[1]["model"][name]), f"{name} depends on the average")
            self.assertTrue(torch.equal(averaged_saved[name], states[1]["average"]["weights"][name]), name)
            if states[0]["model"][name].is_floating_point():
                self.assertTrue(torch.equal(last_saved[name], states[0]["model"][name]), f"{name} with --averaging 0")
                self.assertFalse(torch.equal(last_saved[name], averaged_saved[name]), f"{name} is not averaged")

    def test_pictures_and_measurements_are_of_the_average(self):
        names, seen = ("generate_and_save", "save_reconstruction", "save_measurements", "save_summary"), {}
        with contextlib.ExitStack() as stack:
            for name in names:
                record = lambda model, *_, name=name, **__: seen.update({name: copy.deepcopy(model.state_dict())})
                stack.enter_context(mock.patch.object(self.train, name, side_effect=record))
            _, saved = self.train_quietly("--epochs", "5", "--averaging", "0.9")
        for name in names:
            self.assertTrue(same(seen[name], saved), f"{name} gets other weights than the averaged ones")

    def test_more_epochs_are_the_longer_run(self):
        with mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", (3, None)):
            whole, _ = self.train_quietly("--epochs", "4")
            run, _ = self.train_quietly("--epochs", "2")
            self.assertEqual(self.go_on(run, "--epochs", "4")[0], 0)
            self.assert_same_run(run, whole)
            self.assertEqual(json.loads((run / "hparams.json").read_text())["epochs"], 4)

    def test_finished_run_stays_as_it_is(self):
        run, _ = self.train_quietly("--epochs", "2")
        before = run_contents(run)
        status, out, _ = self.go_on(run)
        self.assertEqual(status, 0)
        self.assertIn("done:", out)
        self.assert_same_contents(run_contents(run), before)

    def test_killed_run_goes_on_from_its_checkpoint(self):
        whole, _ = self.train_quietly("--epochs", "3", "--checkpoint_every", "1")
        log_dir = self.folder()
        save_state, count = self.train.save_state, iter(range(100))

        def save_and_die(*args):  # as a kill would: with later events and pictures already written
            if next(count) in (2, 3):
                raise Stop
            save_state(*args)

        with mock.patch.object(self.train, "save_state", save_and_die), self.few_digits:
            with self.assertRaises(Stop):
                self.run_cli("--dataset", "digits", "--no-cuda", "--epochs", 3, "--checkpoint_every", 1, "--log_dir", log_dir)
            run, = log_dir.iterdir()
            with self.assertRaises(Stop):
                self.run_cli("--resume", run)
        (run / "checkpoints" / "training_state.pt.tmp").write_bytes(b"half")
        self.assertEqual(self.checkpoint.load_state(run)["epoch"], 1)
        self.assertEqual(self.go_on(run)[0], 0)
        self.assert_same_run(run, whole)
        self.assertEqual(list(run.rglob("*.tmp")), [])

    def test_signals_have_their_exit_status_and_the_command_to_go_on(self):
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if not hasattr(signal, name):
                continue
            signum = getattr(signal, name)
            before = signal.getsignal(signum)
            run, stopped = self.stop_after(1, "--epochs", "2", signum=signum)
            self.assertEqual(signal.getsignal(signum), before, "the handler was not put back")
            with mock.patch.object(self.train, "main", side_effect=stopped):
                status, _, err = self.run_cli()
            self.assertEqual(status, 128 + signum)
            self.assertRegex(err, f"{name} after 0 epochs and 1 steps; go on with: python .*train.py --resume {run}")

    def test_signal_after_the_last_step_of_an_epoch(self):
        log_dir, describe = self.folder(), self.train.describe

        def signal_late(means):  # the line of an epoch is printed after its last step
            signal.raise_signal(signal.SIGTERM)
            return describe(means)

        with mock.patch.object(self.train, "describe", signal_late), self.few_digits:
            status, _, err = self.run_cli("--dataset", "digits", "--epochs", 3, "--no-cuda", "--log_dir", log_dir)
        run, = log_dir.iterdir()
        state = self.checkpoint.load_state(run)
        self.assertEqual(status, 128 + signal.SIGTERM)
        self.assertIn(f"after {state['epoch']} epochs and {state['steps']} steps", err)

    def test_ignored_signals_stay_ignored(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        with self.train.stop_signals() as received:
            signal.raise_signal(signal.SIGINT)
        self.assertEqual(received, [])

    def test_second_interrupt_stops_at_once(self):
        with self.train.stop_signals() as received:
            signal.raise_signal(signal.SIGINT)
            self.assertEqual(received, [signal.SIGINT])
            with self.assertRaises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    def test_latest_run(self):
        log_dir = self.folder()
        with self.few_digits:
            for _ in range(2):
                self.assertEqual(self.run_cli("--dataset", "digits", "--epochs", 1, "--log_dir", log_dir, "--no-cuda")[0], 0)
            (log_dir / "2999_01_01_00_00_00").mkdir()  # has no checkpoint
            _, out, _ = self.run_cli("--resume", "latest", "--log_dir", log_dir)
        self.assertIn(str(sorted(log_dir.iterdir())[1]), out)

    def assert_refused(self, result, status, *fragments):
        self.assertEqual(result[0], status, result[2])
        self.assertEqual(len(result[2].strip().splitlines()), 1, result[2])
        for fragment in fragments:
            self.assertIn(str(fragment), result[2])

    def test_flag_that_an_older_run_lacks_is_its_default(self):
        parse = lambda *flags: self.train.parse_args(flags)
        settings = {name: value for name, value in vars(parse()).items() if name not in ("given", "precision")}
        self.assertEqual(self.train.resumed_args(parse(), set(), settings).precision, "fp32")
        with self.assertRaisesRegex(self.train.FlagError, "--precision bf16 contradicts the run, which has fp32"):
            self.train.resumed_args(parse("--precision", "bf16"), {"precision"}, settings)

    def test_contradicting_flags_are_refused_by_name(self):
        run, _ = self.train_quietly("--epochs", "2", "--z_dim", "3")
        before = run_contents(run)
        for flag, value in (("--z_dim", 8), ("--batch_size", 32), ("--lambda_", 1), ("--ae_lr", 0.1), ("--d_lr", 0.1),
                            ("--seed", 1), ("--dataset", "auto"), ("--epochs", 1)):
            self.assert_refused(self.go_on(run, flag, value), 2, flag)
        self.assertEqual(self.go_on(run, "--z_dim", 3, "--num_workers", 2)[0], 0)
        self.assert_same_contents(run_contents(run), before)

    def test_what_cannot_be_resumed(self):
        run, _ = self.train_quietly("--epochs", "1")
        empty, file = self.folder(), self.folder() / "training_state.pt"
        file.write_bytes(b"")
        for wrong in (empty, empty / "none", file, run / "checkpoints" / "model_checkpoint.pt", "latest"):
            self.assert_refused(self.run_cli("--resume", wrong, "--log_dir", empty), 1, empty if wrong == "latest" else wrong)

    def test_run_of_an_older_version_is_refused_by_name(self):
        run, _ = self.train_quietly("--epochs", "1")
        file = run / "checkpoints" / "training_state.pt"
        state = torch.load(file, weights_only=True)
        torch.save({**state, "format": "adversarial autoencoder, training state 1"}, file)
        self.assert_refused(self.go_on(run), 1, file, "older version")

    def test_damaged_checkpoint_is_refused_and_the_one_before_offered(self):
        run, _ = self.train_quietly("--epochs", "2", "--checkpoint_every", "1")
        whole, current = run_contents(run), run / "checkpoints" / "training_state.pt"
        previous, content = current.with_name("training_state.previous.pt"), current.read_bytes()
        random = np.random.default_rng(0)
        damages = [lambda: content[:random.integers(len(content))], lambda: b"", lambda: b"not a checkpoint", self.weights_alone]
        damages += [lambda: self.flipped(content, random)] * 4
        for damage in damages:
            current.write_bytes(damage())
            self.assert_refused(self.go_on(run), 1, current, f"--resume {previous}")
        self.assertEqual(self.checkpoint.load_state(previous)["epoch"], 1)
        self.assertEqual(self.go_on(previous)[0], 0)
        self.assert_same_contents(run_contents(run), whole)
        previous.write_bytes(b"")
        current.write_bytes(b"")
        self.assert_refused(self.go_on(run), 1, current)

    def weights_alone(self):
        return self.checkpoint.packed(self.models.AdversarialAE().state_dict())

    def flipped(self, content, random):
        """Return the content with one bit of some tensor's data the other way."""
        content, place = bytearray(content), int(random.integers(len(content) // 4, len(content) // 2))
        content[place] ^= 1 << int(random.integers(8))
        return bytes(content)

    def test_checkpoint_of_another_architecture(self):
        run, _ = self.train_quietly("--epochs", "1")
        before = run_contents(run)

        class Wider(self.models.AdversarialAE):
            def __init__(self, z_dim):
                super().__init__(z_dim)
                self.encoder.extra = nn.Linear(2, 2)

        with mock.patch.object(self.train, "AdversarialAE", Wider):
            self.assert_refused(self.go_on(run), 1, run, "does not fit models.py")
        self.assert_same_contents(run_contents(run), before)

    def test_checkpoint_of_another_optimizer(self):
        run, _ = self.train_quietly("--epochs", "1")
        build = self.train.build_optimizers
        with mock.patch.object(self.train, "build_optimizers", lambda model, args:
                               (torch.optim.RMSprop(model.encoder.parameters()), build(model, args)[1])):
            self.assert_refused(self.go_on(run, "--epochs", 2), 1, run, "RMSprop")

    def test_a_run_of_another_device_goes_on_with_a_warning(self):
        run, _ = self.train_quietly("--epochs", "1")
        state = self.checkpoint.load_state(run)
        state["settings"]["device"], state["random"]["device"] = "cuda", torch.zeros(16, dtype=torch.uint8)
        del state["path"]
        (run / "checkpoints" / "training_state.pt").write_bytes(self.checkpoint.packed(state))
        status, _, err = self.go_on(run, "--epochs", 2)
        self.assertEqual(status, 0)
        self.assertIn("began with cuda and goes on with cpu", err)

    def test_moments_of_another_layout(self):
        run, _ = self.train_quietly("--epochs", "1")
        state = self.checkpoint.load_state(run)
        del state["path"]
        for moments in state["optimizer_ae"]["state"].values():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = moments[name].contiguous()  # as CUDA has them
        (run / "checkpoints" / "training_state.pt").write_bytes(self.checkpoint.packed(state))
        self.assertEqual(self.go_on(run, "--epochs", 2)[0], 0)
        self.assert_same_run(run, self.train_quietly("--epochs", "2")[0])

    def test_more_epochs_survive_a_kill(self):
        run, _ = self.train_quietly("--epochs", "2")
        with mock.patch.object(self.train, "train_aae", side_effect=Stop), self.assertRaises(Stop):
            self.go_on(run, "--epochs", 4)
        self.assertEqual(self.go_on(run)[0], 0)
        self.assert_same_run(run, self.train_quietly("--epochs", "4")[0])

    def test_weights_older_than_the_state_are_written_again(self):
        run, weights = self.train_quietly("--epochs", "2")
        (run / "checkpoints" / "model_checkpoint.pt").unlink()
        self.assertEqual(self.go_on(run)[0], 0)
        self.assertTrue(same(weights, torch.load(run / "checkpoints" / "model_checkpoint.pt", weights_only=True)))

    def test_what_came_after_the_checkpoint_is_removed(self):
        run, _ = self.train_quietly("--epochs", "2")
        late = [run / "results" / "Prior_samples" / "samples_epoch_10.png", run / "events.out.tfevents.9999999999.host.1.0"]
        for file in late:
            file.write_bytes(b"half")
        self.assertEqual(self.go_on(run)[0], 0)
        self.assertEqual([file.name for file in late if file.exists()], [])

    def test_state_named_from_within_its_folder(self):
        run, _ = self.train_quietly("--epochs", "1")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(run / "checkpoints")
        self.assertEqual(self.go_on("training_state.pt")[0], 0)
        os.chdir(run)
        self.assertEqual(self.go_on(".")[0], 0)

    def test_file_system_without_locks(self):
        if self.checkpoint.fcntl is None:
            self.skipTest("runs are not locked here")
        run, _ = self.train_quietly("--epochs", "1")
        with mock.patch.object(self.checkpoint.fcntl, "flock", side_effect=OSError(38, "Function not implemented")):
            status, _, err = self.go_on(run)
        self.assertEqual(status, 0)
        self.assertIn("cannot be locked", err)

    def test_a_run_in_use_is_refused(self):
        run, _ = self.train_quietly("--epochs", "1")
        if self.checkpoint.fcntl is None:
            self.skipTest("runs are not locked here")
        with self.checkpoint.locked(run):
            self.assert_refused(self.go_on(run), 1, run, "in use")
        self.assertEqual(self.go_on(run)[0], 0)

    def test_full_disk_leaves_the_last_checkpoint(self):
        log_dir, fsync = self.folder(), os.fsync

        def full(file):  # while a second training state is written
            if all(any(log_dir.glob(f"*/checkpoints/training_state.pt{ending}")) for ending in ("", ".tmp")):
                raise OSError(28, "No space left on device")
            fsync(file)

        with mock.patch("os.fsync", full), self.few_digits:
            self.assert_refused(self.run_cli("--dataset", "digits", "--epochs", 2, "--checkpoint_every", 1, "--no-cuda",
                                             "--log_dir", log_dir), 1, "training_state.pt", "No space left")
        run, = log_dir.iterdir()
        self.assertEqual(self.checkpoint.load_state(run)["epoch"], 0)
        self.assertEqual(list(run.rglob("*.tmp")), [])
        self.assertEqual(self.go_on(run)[0], 0)
        self.assert_same_run(run, self.train_quietly("--epochs", "2")[0])

    def test_removed_run_folder_is_said_and_does_not_come_back(self):
        log_dir = self.folder()
        save_pictures = self.train.Session.save_pictures

        def remove_folder(session, *args):
            if session.epoch:
                os.rename(session.run, log_dir / "elsewhere")
            save_pictures(session, *args)

        with mock.patch.object(self.train.Session, "save_pictures", remove_folder), self.few_digits:
            result = self.run_cli("--dataset", "digits", "--epochs", 2, "--no-cuda", "--log_dir", log_dir)
        self.assert_refused(result, 1, log_dir, "No such file")
        self.assertEqual([folder.name for folder in log_dir.iterdir()], ["elsewhere"])

    def test_training_state_may_be_loaded_safely(self):
        run, _ = self.train_quietly("--epochs", "1")
        state = torch.load(run / "checkpoints" / "training_state.pt", weights_only=True)
        self.assertEqual((state["epoch"], state["steps"]), (1, 0))
