"""Check that faster training gives equivalent results:  python benchmarks/equivalence.py

On CUDA, compare the captured step with the eager one: losses and weights after 200 steps from the same weights and
random numbers. Then, on any device, compare whole runs of train.py in every precision that the hardware supports, with
several seeds: does the precision change the results more than the seed? Finished runs in --runs are not repeated.

One core of an AMD EPYC (Zen 5), torch 2.15.0, 20 epochs, seeds 42, 1 and 2, mean (minimum..maximum):

                                        fp32                    bf16
    recon_loss                          0.0434 (0.0433..0.0435) 0.0433 (0.0432..0.0435)
    accuracy                            0.628 (0.625..0.630)    0.629 (0.625..0.632)
    test MSE                            0.0422 (0.0420..0.0423) 0.0421 (0.0420..0.0423)
    mean variance of the codes          0.957 (0.945..0.972)    0.953 (0.946..0.963)
    largest covariance of 2 dimensions  0.047 (0.039..0.053)    0.047 (0.042..0.053)

Not yet run on CUDA.
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from statistics import mean

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import training.threads  # noqa: F401 (before torch, which reads the variables that it sets)

# isort: split

import torch

import mnist
import train
from evaluation.monitoring import reconstruct
from training.checkpoint import read_state
from training.data import load_training_set
from training.device import PrecisionError, choose_device, set_precision
from training.options import HYPERPARAMETERS

STEPS = 200


def captured_and_eager(args, device):
    """Return the largest differences in losses and in weights between STEPS captured and eager steps."""
    trainings = []
    for capturable in (True, False):
        torch.manual_seed(args.seeds[0])
        flags = train.parse_args(["--data_dir", args.data_dir])
        loader, _, _ = load_training_set(flags, device)
        model = train.build_model(flags.z_dim).to(device)
        model.capturable = capturable
        optimizers, values = train.build_optimizers(model, flags), []
        step = train.build_step(model, *optimizers, flags)
        for number, (x, _) in zip(range(STEPS), loader, strict=False):  # the loader has more batches
            train.set_learning_rate(optimizers[0], flags.drop_after + 2 * number // STEPS, flags)  # drops halfway
            values.append(torch.stack([value.clone() for part in step(x) for value in part.values()]))
        trainings.append((torch.stack(values), torch.cat([weight.detach().flatten() for weight in model.parameters()])))
    return [float((captured - eager).abs().max()) for captured, eager in zip(*trainings, strict=True)]


def finished_run(args, device, precision, seed):
    """Return the training state of a run with this precision and seed; train it unless it is in --runs."""
    folder = args.runs / f"{precision}-seed{seed}{'-base' * args.base}"
    flags = train.parse_args([
        "--precision", precision, "--seed", str(seed), "--epochs", str(args.epochs), "--data_dir", args.data_dir,
        "--dataset", "mnist", "--log_dir", str(folder), *["--no-cuda"] * args.no_cuda, *["--base"] * args.base])
    wanted = {name: value for name, value in vars(flags).items() if name in HYPERPARAMETERS} | {"device": device.type}
    for file in folder.glob("*/checkpoints/training_state.pt"):
        state = read_state(file)
        if state["epoch"] == args.epochs and wanted.items() <= state["settings"].items():
            return state
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.main(flags)
    return read_state(run / "checkpoints" / "training_state.pt")


@torch.no_grad()
def figures(state, images):
    """Return a run's results, on test images and in its last epoch, as a dict of numbers."""
    model = train.build_model(state["settings"]["z_dim"], networks=state["settings"]["networks"])
    model.load_state_dict(state["average"]["weights"])
    recon, codes = reconstruct(model.eval(), images)
    off_diagonal = torch.cov(codes.T) - torch.diag(torch.var(codes, 0))
    return {"recon_loss": state["means"]["recon_loss"], "accuracy": state["means"]["accuracy"],
            "test MSE": float((recon - images).square().mean()), "largest |mean|": float(codes.mean(0).abs().max()),
            "mean variance": float(codes.var(0).mean()), "largest |covariance|": float(off_diagonal.abs().max())}


def print_table(results):
    """Print each result's mean and range over the seeds; mark ranges that do not overlap with that of fp32."""
    print(f"\n{'':<24}" + "".join(f"{precision:<30}" for precision in results))
    for name in next(iter(results["fp32"].values())):
        columns = {precision: [run[name] for run in runs.values()] for precision, runs in results.items()}
        line = f"{name:<24}"
        for values in columns.values():
            apart = min(values) > max(columns["fp32"]) or max(values) < min(columns["fp32"])
            line += f"{f'{mean(values):.4f} ({min(values):.4f}..{max(values):.4f})' + '*' * apart:<30}"
        print(line)
    print("mean (minimum..maximum) over the seeds; *: does not overlap with fp32's range, which happens by chance for "
          "one result in ten with three seeds each")


def main():
    parser = argparse.ArgumentParser(description="Compare captured steps with eager ones, and precisions with fp32.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--data_dir", default=str(PROJECT.parent / "data"), help="MNIST's folder")
    parser.add_argument("--runs", type=Path, default=PROJECT / "AAE_logs" / "equivalence", help="folder of the runs")
    parser.add_argument("--json", type=Path, help="save the results to this file")
    parser.add_argument("--base", action="store_true",
                        help="pass --base to train.py: compare the networks and training that the assignment suggests")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    device, results, steps = choose_device(args.no_cuda), {}, None
    if device.type == "cuda":
        set_precision("fp32", device)
        choose_device(deterministic=True)  # otherwise even two eager trainings differ
        steps = captured_and_eager(args, device)
        torch.use_deterministic_algorithms(False)
        print(f"captured and eager, {STEPS} steps: losses differ by at most {steps[0]:.2g}, weights by "
              f"{steps[1]:.2g}")
    else:
        print("captured and eager: not compared, because CUDA is not available")
    try:
        images, _ = mnist.load_mnist(args.data_dir, train=False)
    except mnist.DataError as error:
        sys.exit(f"equivalence.py: error: {error}")
    for precision in ("fp32", "tf32", "bf16"):
        try:
            set_precision(precision, device)
        except PrecisionError as error:
            print(f"not run: {error}")
            continue
        results[precision] = {seed: figures(finished_run(args, device, precision, seed), images) for seed in args.seeds}
    print_table(results)
    if args.json:
        args.json.write_text(json.dumps({"captured": steps, "precisions": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
