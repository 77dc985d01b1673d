"""Distances of samples, codes and features from their targets: functions of tensors, on any device with float64.

A perfect model does not reach 0 with finitely many samples: compare with as many from the true distribution.
"""

import math

import torch

CHUNK = 250  # rows of a distance matrix in memory at once: 10 MB of float32 with 10,000 columns


def frechet(features_a, features_b):
    """Return the squared Frechet distance between Gaussians fitted to features [N, d] and [M, d]."""
    # |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, equation 6). The last trace is
    # the sum of the singular values of S1^(1/2) S2^(1/2), which is exact for singular covariances too.
    a, b = features_a.double(), features_b.double()
    covariances = a.T.cov(), b.T.cov()
    roots = [vectors * values.clamp(min=0).sqrt() @ vectors.T  # eigenvalues are below 0 by rounding alone
             for values, vectors in map(torch.linalg.eigh, covariances)]
    overlap = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + covariances[0].trace() + covariances[1].trace() - 2 * overlap).item()


def choose_sigma(samples, images, low=0.01, high=10.0):
    """Return the sigma with the largest mean Parzen log-likelihood of images; raise ValueError at `low` and `high`."""
    distances, pixels = list(squared_distances(samples, images)), images[0].numel()
    for _ in range(3):  # steps end below 1 %: half a step from the optimum costs 784 pixels 784 * 0.005^2 = 0.02 nats
        grid = torch.logspace(math.log10(low), math.log10(high), 16, dtype=torch.float64).tolist()
        means = [parzen_log_likelihood(distances, pixels, sigma).mean().item() for sigma in grid]
        best = max(range(16), key=means.__getitem__)
        if best in (0, 15):
            raise ValueError(f"the best sigma is not between {low:g} and {high:g}")
        low, high = grid[best - 1], grid[best + 1]
    return grid[best]


def parzen_log_likelihood(distances, pixels, sigma):
    """Return the Parzen log-likelihood [N] in nats, float64, of images with these squared_distances to M samples."""
    # The density is the mean of M Gaussians of standard deviation sigma in each pixel, one around each sample
    # (Goodfellow et al. 2014, arXiv:1406.2661, section 5; table 1 of Makhzani et al. 2015, arXiv:1511.05644).
    normalisation = pixels * math.log(sigma * math.sqrt(2 * math.pi))
    return torch.cat([(chunk / (-2 * sigma**2)).logsumexp(1).double() - math.log(chunk.shape[1]) - normalisation
                      for chunk in distances])


def squared_distances(samples, images):
    """Yield the squared distances [CHUNK, M] of images x [N, ...], CHUNK at a time, to samples y [M, ...]."""
    # |x|^2 + |y|^2 - 2 x y; with the samples' mean subtracted, its rounding error is below 1e-4 (float32, 784 pixels)
    samples = samples.flatten(1)
    mean = samples.mean(0)
    samples = samples - mean
    for part in images.flatten(1).split(CHUNK):
        part = part.to(samples) - mean
        norms = part.square().sum(1)[:, None] + samples.square().sum(1)
        yield torch.addmm(norms, part, samples.T, alpha=-2).clamp_(min=0)
