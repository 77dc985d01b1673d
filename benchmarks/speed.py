"""Compare the time of an epoch of train.py with that of a plain training loop:  python benchmarks/speed.py

The variants are timed in turn, for several rounds, each in its own process; "base" is train.py --base. The plain loop,
in `plain_epoch`, is what most implementations have: the same networks and optimizers in fp32, torchvision's MNIST
decoded image by image, a DataLoader, and .item() on every loss at every step; once without workers, and once with the
fastest number of workers. Part of an epoch is timed and scaled up. With --profile, it prints the most expensive
operations of each variant instead.

Two cores of an AMD EPYC (Zen 5), torch 2.15.0, seconds per epoch, medians of three rounds of 200 steps: fp32 25.1, bf16
18.2, base 20.7, plain 31.0 (no workers, the fastest there). Not yet run on CUDA.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import training.threads  # noqa: F401 (before torch, which reads the variables that it sets)

WAYS = {"fp32": [], "tf32": ["--precision", "tf32"], "bf16": ["--precision", "bf16"]}  # name -> flags of train.py
SPINS = {"libgomp's own spin": {},  # how long a waiting thread spins; train.py uses the second
         **{f"spin {count:,}": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 300, 2000, 10000)},
         "passive waiting": {"OMP_WAIT_POLICY": "PASSIVE"}}
TIMEOUT = 120  # seconds for several processes at once
CUDA_WAYS = {"eager": [], "deterministic": ["--deterministic"]}  # "eager": without a CUDA graph


def project_epoch(args, device, steps, way, writer):
    """Return a function that trains for `steps` steps with train.py's code."""

    import mnist
    import train
    from training.data import Batches, load_training_set
    from training.device import keep_freed_memory

    keep_freed_memory()
    loader, _, _ = load_training_set(args, device)
    images, labels = (tensor[:steps * args.batch_size] for tensor in loader.dataset.tensors)
    loader = mnist.BatchLoader(images, labels, args.batch_size, device=device)
    model = train.to_device(train.build_model(args.z_dim, networks=args.networks), device, args.precision)
    model.capturable = way != "eager"
    loggers = [train.TensorBoardLogger(writer, name=name) for name in ("generator", "discriminator")]
    optimizers = train.build_optimizers(model, args)
    step, ema = train.build_step(model, *optimizers, args), train.EMA(model, args.averaging)
    batches = Batches(loader, ema.update)
    return partial(train.train_aae, 1, model, batches, *loggers, *optimizers, args.lambda_, step=step)


def plain_epoch(args, device, steps, workers, writer):
    """Return a function that trains for `steps` steps with the plain loop."""
    import torch
    from torch.utils.data import DataLoader, Subset

    from models import AdversarialAE

    data = Subset(plain_images(args), range(steps * args.batch_size))
    loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda",
                        persistent_workers=workers > 0)
    model = AdversarialAE(args.z_dim).to(device)
    optimizer_ae = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], args.ae_lr,
                                    (0.5, 0.999))
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), args.d_lr, args.d_momentum)

    def epoch():
        for step, (x, _) in enumerate(loader):
            x = x.to(device)
            recon_x, z = model(x)
            ae_loss, ae_values = model.get_loss_autoencoder(x, recon_x, z, args.lambda_)
            disc_loss, disc_values = model.get_loss_discriminator(z.detach())
            optimizer_ae.zero_grad()
            ae_loss.backward()
            optimizer_ae.step()
            optimizer_disc.zero_grad()
            disc_loss.backward()
            optimizer_disc.step()
            values = {name: value.item() for name, value in {**ae_values, **disc_values}.items()}
            if step % 50 == 49:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)

    return epoch


def plain_images(args):
    """Return torchvision's MNIST, which decodes, converts and normalises an image at each access."""
    from torchvision import datasets, transforms

    import mnist

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    if args.dataset == "mnist":
        return datasets.MNIST(args.data_dir, transform=transform)

    class Digits:
        images = [transforms.functional.to_pil_image((image + 1) / 2) for image in mnist.load_digits()[0]]

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return transform(self.images[index]), 0

    return Digits()


def measure(args, folder):
    """Time a variant in this process; print seconds per step and peak memory in MB as JSON. Events go to `folder`."""
    if args.own_spin:
        del os.environ["GOMP_SPINCOUNT"]
    import torch

    bare = peak_memory()
    from torch.utils.tensorboard import SummaryWriter

    from training.device import choose_device, device_name, set_precision
    from training.options import parse_args

    flags = parse_args(["--dataset", args.dataset, "--data_dir", args.data_dir, *["--no-cuda"] * args.no_cuda,
                        *{**WAYS, **CUDA_WAYS, "base": ["--base"]}.get(args.way, [])])
    device = choose_device(flags.no_cuda, flags.deterministic)
    torch.manual_seed(flags.seed)
    set_precision(flags.precision, device)
    writer = SummaryWriter(folder)
    if args.way == "plain":
        epoch = plain_epoch(flags, device, args.steps, args.workers, writer)
    else:
        epoch = project_epoch(flags, device, args.steps, args.way, writer)
    epoch()  # warm-up
    if args.profile:
        print(profiled(epoch, args.steps, device))
        writer.close()
        return
    wait(device)
    if args.beside:  # wait until all processes are ready
        print("ready", flush=True)
        sys.stdin.readline()
    start = time.perf_counter()
    epoch()
    wait(device)
    seconds = time.perf_counter() - start
    writer.close()
    gpu = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0
    print(json.dumps({"step": seconds / args.steps, "memory": peak_memory() - bare, "gpu_memory": gpu,
                      "device": f"{device.type} ({device_name(device)})", "torch": torch.__version__}))


def profiled(epoch, steps, device):
    """Return a table of the slowest operations in `epoch`, in milliseconds per step and calls per step."""
    import torch

    with torch.profiler.profile() as profile:
        epoch()
        wait(device)
    events, side = profile.key_averages(), "cpu"
    if device.type == "cuda":  # count kernels only: their time is also in the operations that launch them
        events = [event for event in events
                  if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]
        side = "device"
    costs = {event.key: (getattr(event, f"self_{side}_time_total") / 1000 / steps, event.count / steps)
             for event in events}
    lines = [f"{name[:60]:<62}{ms:>8.3f} ms{calls:>8.1f}"
             for name, (ms, calls) in sorted(costs.items(), key=lambda item: -item[1][0])[:12]]
    return "\n".join([*lines, f"{'all':<62}{sum(ms for ms, _ in costs.values()):>8.3f} ms"])


def wait(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory():
    """Return the peak resident memory of this process in MB."""
    if sys.platform == "linux":  # where ru_maxrss includes the parent's memory
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_own_process(args, way, workers=0):
    """Run `measure` in a new process and return its output."""
    output = subprocess.run(command_of(args, way, workers), check=True, stdout=subprocess.PIPE, text=True).stdout
    return output if args.profile else json.loads(output.splitlines()[-1])


def command_of(args, way, workers=0):
    """Return the command that times a variant in a new process."""
    return [sys.executable, __file__, "--way", way, "--workers", str(workers), "--steps", str(args.steps), "--dataset",
            args.dataset, "--data_dir", args.data_dir, *["--no-cuda"] * args.no_cuda, *["--profile"] * args.profile,
            *["--beside"] * args.beside]


def beside(args):
    """Print step times for various spins: alone, two and three at once, and next to a busy process."""
    print(f"ms per step, {args.steps} steps, median of {args.rounds} rounds; of several processes, the slowest")
    print(f"{'':<32}{'alone':>9}{'two':>9}{'three':>9}{'busy CPU':>13}")
    for way in ("fp32", "base", "bf16"):
        if way not in ways_here(args):
            continue
        for name, settings in SPINS.items() if way == "fp32" else list(SPINS.items())[:2]:
            cells = [median(max(together(args, way, settings, count, busy)) for _ in range(args.rounds))
                     for count, busy in ((1, False), (2, False), (3, False), (1, True))]
            print(f"{way + ', ' + name:<32}{cells[0]:>9.1f}{cells[1]:>9.1f}{cells[2]:>9.1f}{cells[3]:>13.1f}",
                  flush=True)


def together(args, way, settings, count, busy):
    """Return the ms per step of `count` parallel processes; [inf] if they take more than TIMEOUT seconds."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    spinner = [subprocess.Popen([sys.executable, "-c", "while True: pass"])] if busy else []
    command = [*command_of(args, way), *["--own_spin"] * (not settings)]
    processes = [subprocess.Popen(command, env={**environment, **settings}, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        for process in processes:
            process.stdout.readline()
        deadline = time.monotonic() + TIMEOUT
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=max(0, deadline - time.monotonic()))[0] for process in processes]
        return [1000 * json.loads(output.splitlines()[-1])["step"] for output in outputs]
    except subprocess.TimeoutExpired:
        return [float("inf")]
    finally:
        for process in (*processes, *spinner):
            process.kill()
            process.wait()


def ways_here(args):
    """Return the variants of train.py that this machine supports."""
    from training.device import PrecisionError, choose_device, set_precision

    device, ways = choose_device(args.no_cuda), []
    for way in WAYS:
        try:
            set_precision(way, device)
            ways.append(way)
        except PrecisionError as error:
            print(f"not timed: {error}")
    return [*ways, "base", *(CUDA_WAYS if device.type == "cuda" else ())]


def worker_counts():
    """Return the numbers of workers to try: 0, powers of two, and the number of cores for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return sorted({0, cores, *(2**power for power in range(cores.bit_length()))})


def compare(args):
    """Time all variants in turn, print the table, and return all results."""
    trials = {workers: in_own_process(args, "plain", workers)["step"] for workers in worker_counts()}
    print("plain loop, ms per step with "
          + ", ".join(f"{count} workers: {1000 * step:.1f}" for count, step in trials.items()))
    best = min(trials, key=trials.get)
    plain = {f"plain, {workers} workers": workers for workers in sorted({0, best})}
    ways = ways_here(args)
    rounds = []
    for number in range(1, args.rounds + 1):
        timings = {way: in_own_process(args, way) for way in ways}
        timings |= {name: in_own_process(args, "plain", workers) for name, workers in plain.items()}
        rounds.append(timings)
        print(f"round {number}, ms per step: "
              + ", ".join(f"{name} {1000 * timing['step']:.2f}" for name, timing in timings.items()))
    print_table(rounds, 938 if args.dataset == "mnist" else 24, args.steps)
    ratios = {f"{name} / {way}": [timings[name]["step"] / timings[way]["step"] for timings in rounds]
              for name in plain for way in ways}
    for name, values in ratios.items():
        print(f"{name}, round by round: {', '.join(f'{ratio:.2f}' for ratio in values)}; median {median(values):.2f}")
    return {"workers": trials, "rounds": rounds, "ratios": ratios, "steps_timed": args.steps, "dataset": args.dataset}


def print_table(rounds, steps, timed):
    first = next(iter(rounds[0].values()))
    print(f"\n{first['device']}, torch {first['torch']}; seconds per epoch of {steps} steps, from {timed} steps timed; "
          f"memory above bare torch")
    print(f"{'':<20}{'median':>9}{'minimum':>9}{'maximum':>9}{'memory':>12}{'GPU memory':>12}")
    for name in rounds[0]:
        seconds = [steps * timings[name]["step"] for timings in rounds]
        memory, gpu = (max(timings[name][kind] for timings in rounds) for kind in ("memory", "gpu_memory"))
        print(f"{name:<20}{median(seconds):>9.2f}{min(seconds):>9.2f}{max(seconds):>9.2f}"
              f"{memory:>9.0f} MB{gpu:>9.0f} MB")


def main():
    from training.cli import number

    parser = argparse.ArgumentParser(description="Compare the time of train.py's epoch with that of a plain loop.")
    parser.add_argument("--rounds", type=number(int, 1), default=3, help="number of rounds over all variants")
    parser.add_argument("--steps", type=number(int, 1, 937), default=200,
                        help="timed steps, after as many warm-up steps")
    parser.add_argument("--data_dir", default=str(PROJECT.parent / "data"), help="MNIST's folder")
    parser.add_argument("--json", type=Path, help="save the results to this file")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA")
    parser.add_argument("--beside", action="store_true", help="instead, time steps next to other processes, on the CPU")
    parser.add_argument("--profile", action="store_true", help="instead, show the slowest operations of a step")
    parser.add_argument("--own_spin", action="store_true", help=argparse.SUPPRESS)
    for name in ("way", "workers", "dataset"):  # set by this script for its subprocesses
        parser.add_argument(f"--{name}", type=int if name == "workers" else str, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        with tempfile.TemporaryDirectory() as folder:
            measure(args, folder)
        return
    args.dataset = "mnist"
    try:
        from mnist import MissingData, load_mnist

        load_mnist(args.data_dir)
    except MissingData as error:
        print(f"using the bundled digits instead of MNIST: {error}")
        args.dataset, args.steps = "digits", min(args.steps, 23)
    if args.beside:
        args.no_cuda = True
        beside(args)
        return
    if args.profile:
        for way in (*ways_here(args), "plain"):
            print(f"\n{way}, a step:\n{in_own_process(args, way)}", end="")
        return
    figures = compare(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
