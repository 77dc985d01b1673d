"""Time an epoch of train.py against the plain loop that most implementations have:  python benchmarks/speed.py

The two take turns for several rounds, each round in a process of its own. The plain loop is written out in `plain_epoch`: the
same networks and optimizers, torchvision's MNIST decoded image by image, a DataLoader with as many workers as are fastest
here, and every loss read with .item() at every step. A part of an epoch is timed and scaled up.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))


def project_epoch(args, device, steps):
    """Return a function that trains for `steps` steps the project's way."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    import mnist
    import train

    train.keep_freed_memory()
    loader, _, _ = train.load_data(args, device)
    images, labels = (tensor[:steps * args.batch_size] for tensor in loader.dataset.tensors)
    loader = mnist.BatchLoader(images, labels, args.batch_size, device=device)
    model = train.AdversarialAE(args.z_dim).to(device)
    writer = SummaryWriter(tempfile.mkdtemp())
    loggers = [train.TensorBoardLogger(writer, name=name) for name in ("generator", "discriminator")]
    optimizers = train.build_optimizers(model, args)
    return lambda: train.train_aae(1, model, loader, *loggers, *optimizers, args.lambda_)


def plain_epoch(args, device, steps, workers):
    """Return a function that trains for `steps` steps the plain way."""
    import torch
    from torch.utils.data import DataLoader, Subset
    from torch.utils.tensorboard import SummaryWriter

    import train

    data = Subset(plain_images(args), range(steps * args.batch_size))
    loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda",
                        persistent_workers=workers > 0)
    model = train.AdversarialAE(args.z_dim).to(device)
    optimizer_ae = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], args.ae_lr, (0.5, 0.999))
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), args.d_lr)
    writer = SummaryWriter(tempfile.mkdtemp())

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
    """Return torchvision's MNIST, each image decoded, turned into a tensor and normalised whenever it is asked for."""
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


def measure(args):
    """Time one way in this process; print seconds per step and peak memory in MB as JSON."""
    import torch

    bare = peak_memory()
    import train

    flags = train.parse_args(["--dataset", args.dataset, "--data_dir", args.data_dir, *["--no-cuda"] * args.no_cuda])
    device = train.choose_device(flags.no_cuda)
    torch.manual_seed(flags.seed)
    epoch = project_epoch(flags, device, args.steps) if args.way == "project" else \
        plain_epoch(flags, device, args.steps, args.workers)
    epoch()  # warms up
    wait(device)
    start = time.perf_counter()
    epoch()
    wait(device)
    seconds = time.perf_counter() - start
    gpu = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0
    print(json.dumps({"step": seconds / args.steps, "memory": peak_memory() - bare, "gpu_memory": gpu,
                      "device": f"{device.type} ({train.device_name(device)})", "torch": torch.__version__}))


def wait(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory():
    """Return the most memory that this process has had resident, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)


def in_own_process(args, way, workers=0):
    """Return what `measure` prints in a new process."""
    command = [sys.executable, __file__, "--way", way, "--workers", str(workers), "--steps", str(args.steps), "--dataset",
               args.dataset, "--data_dir", args.data_dir, *["--no-cuda"] * args.no_cuda]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def compare(args):
    """Let both ways take turns, print the table, and return all figures."""
    settings = sorted({0, 1, os.cpu_count()})
    trials = {workers: in_own_process(args, "plain", workers)["step"] for workers in settings}
    workers = min(trials, key=trials.get)
    print("plain loop, ms a step with " + ", ".join(f"{count} workers: {1000 * step:.1f}" for count, step in trials.items()))
    rounds = []
    for _ in range(args.rounds):
        rounds.append({"project": in_own_process(args, "project"), "plain": in_own_process(args, "plain", workers)})
        project, plain = (1000 * rounds[-1][way]["step"] for way in ("project", "plain"))
        print(f"round {len(rounds)}: project {project:.1f}, plain {plain:.1f} ms a step")
    steps = 938 if args.dataset == "mnist" else 24
    first = rounds[0]["project"]
    print(f"\n{first['device']}, torch {first['torch']}; seconds per epoch of {steps} steps, from {args.steps} steps timed; "
          f"memory above bare torch")
    print(f"{'':<10}{'median':>9}{'minimum':>9}{'maximum':>9}{'memory':>12}{'GPU memory':>12}")
    for way in ("project", "plain"):
        seconds = [steps * found[way]["step"] for found in rounds]
        memory, gpu = (max(found[way][name] for found in rounds) for name in ("memory", "gpu_memory"))
        print(f"{way:<10}{median(seconds):>9.2f}{min(seconds):>9.2f}{max(seconds):>9.2f}{memory:>9.0f} MB{gpu:>9.0f} MB")
    ratios = [found["plain"]["step"] / found["project"]["step"] for found in rounds]
    print(f"plain / project, round by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; median {median(ratios):.2f}")
    return {"workers": trials, "rounds": rounds, "ratios": ratios, "steps_timed": args.steps, "dataset": args.dataset}


def main():
    parser = argparse.ArgumentParser(description="Time train.py's epoch against the plain loop's.")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each of both ways")
    parser.add_argument("--steps", type=int, default=200, help="steps that are timed, after as many to warm up")
    parser.add_argument("--data_dir", default=str(PROJECT.parent / "data"), help="folder where MNIST is")
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA")
    for name in ("way", "workers", "dataset"):  # set by this script for the processes that it starts
        parser.add_argument(f"--{name}", type=int if name == "workers" else str, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        measure(args)
        return
    args.dataset = "mnist"
    try:
        from mnist import MissingData, load_mnist

        load_mnist(args.data_dir)
    except MissingData as error:
        print(f"timed on the bundled digits, not on MNIST: {error}")
        args.dataset, args.steps = "digits", min(args.steps, 23)
    figures = compare(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
