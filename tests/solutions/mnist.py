"""The mnist.py of template.py, as torchvision's examples write it."""

from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def mnist(root="../data", batch_size=64, num_workers=4, download=True):
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    dataset = datasets.MNIST(root, train=True, transform=transform, download=download)
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=num_workers, drop_last=False)
