"""Distances of samples, codes and features from their targets: functions of tensors, on any device with float64.

A perfect model does not reach 0 with finitely many samples: compare with as many from the true distribution.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

CHUNK = 250  # rows of a distance matrix in memory at once: 20 MB of float64 with 10,000 columns
STEPS = 400  # of the classifier that tells codes from prior samples


def frechet_to_prior(codes):
    """Return the squared Frechet distance between N(m, S), fitted to codes [N, z_dim], and the prior N(0, I).

    |m|^2 + tr(S + I - 2 S^(1/2)) (Dowson and Landau 1982): with the eigenvalues s of S, |m|^2 + sum (sqrt(s) - 1)^2.
    """
    mean, covariance = moments(codes)
    deviations = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt()
    return (mean.square().sum() + (deviations - 1).square().sum()).item()


def two_sample_accuracy(codes, seed=0):
    """Return the accuracy in [0, 1] of a classifier that tells held-out codes [N, z_dim] from prior samples.

    This is a classifier two-sample test (Lopez-Paz and Oquab, arXiv:1610.06545): 0.5 if nothing tells them apart, for
    any z_dim. An MLP is trained on half of the codes and tested on the other half and as many prior samples, a second
    one the other way round; the standard error is 0.5 / sqrt(2 N). It runs on the CPU, where a seed fixes the result.
    """
    right = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        codes = codes.detach().cpu().float()[torch.randperm(len(codes))]
        for train, test in ((codes[::2], codes[1::2]), (codes[1::2], codes[::2])):
            logit = train_mlp(train)
            right += [logit(test) > 0, logit(torch.randn_like(test)) < 0]
    return torch.cat(right).double().mean().item()


def train_mlp(codes, batch=250):
    """Return an MLP with a logit above 0 for codes [N, z_dim], below 0 for prior samples, new ones in each step."""
    logit = nn.Sequential(nn.Linear(codes.shape[1], 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(logit.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS)
    signs = torch.tensor([-1.0, 1.0]).repeat_interleave(batch)[:, None]
    for _ in range(STEPS):
        chosen = codes[torch.randint(len(codes), (batch,))]
        loss = F.softplus(signs * logit(torch.cat([chosen, torch.randn_like(chosen)]))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return logit


def frechet(features_a, features_b):
    """Return the squared Frechet distance between Gaussians fitted to features [N, d] and [M, d].

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500,
    equation 6). The trace of (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2), which needs no
    root of a non-symmetric matrix and is exact for singular covariances too.
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = moments(features_a), moments(features_b)
    overlap = torch.linalg.svdvals(symmetric_root(covariance_a) @ symmetric_root(covariance_b)).sum()
    return ((mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * overlap).item()


def moments(values):
    """Return the mean [d] and the unbiased covariance [d, d] of values [N, d], in float64; N is at least 2."""
    values = values.double()
    mean = values.mean(0)
    return mean, (values - mean).T @ (values - mean) / (len(values) - 1)


def symmetric_root(matrix):
    """Return the square root of a symmetric matrix [d, d] whose eigenvalues, except for rounding, are at least 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def parzen_log_likelihood(samples, images, sigma):
    """Return the log-likelihood [N] in nats of images [N, ...] in [0, 1] under a Parzen window of samples [M, ...].

    The density is the mean of M Gaussians of standard deviation sigma in each pixel, one around each sample:
    Goodfellow et al. 2014, arXiv:1406.2661, section 5, and table 1 of Makhzani et al. 2015, arXiv:1511.05644.
    """
    return torch.cat([log_density(part, sigma, images[0].numel()) for part in squared_distances(samples, images)])


def choose_sigma(samples, images, low=0.01, high=10.0):
    """Return the sigma in (low, high) with the largest mean Parzen log-likelihood of images [N, ...] in [0, 1].

    Searches three grids of 16 sigmas, each between the neighbours of the best sigma of the previous grid. The last
    grid's steps are below 1 %; half a step from the optimum costs an image of 784 pixels about 784 * 0.005^2 = 0.02
    nats. Raises ValueError if the optimum is at the edge of a grid.
    """
    distances, pixels = list(squared_distances(samples, images)), images[0].numel()
    for _ in range(3):
        grid = torch.logspace(math.log10(low), math.log10(high), 16, dtype=torch.float64).tolist()
        means = [torch.cat([log_density(part, sigma, pixels) for part in distances]).mean().item() for sigma in grid]
        best = max(range(16), key=means.__getitem__)
        if best in (0, 15):
            raise ValueError(f"the best sigma is not between {low:g} and {high:g}")
        low, high = grid[best - 1], grid[best + 1]
    return grid[best]


def log_density(distances, sigma, pixels):
    """Return the Parzen log-likelihood [N], float64, for squared distances [N, M] to samples of `pixels` dimensions."""
    exponents = (distances / (-2 * sigma**2)).logsumexp(1).double()
    return exponents - math.log(distances.shape[1]) - pixels * math.log(sigma * math.sqrt(2 * math.pi))


def squared_distances(samples, images):
    """Yield the squared distances [CHUNK, M] of images x [N, ...], CHUNK at a time, to samples y [M, ...].

    They are |x|^2 + |y|^2 - 2 x y with the rounding error of this sum: the samples' mean is subtracted from x and y, so
    that it is below 1e-4 in float32, for images of 784 pixels.
    """
    samples = samples.flatten(1)
    mean = samples.mean(0)
    samples = samples - mean
    for part in images.flatten(1).split(CHUNK):
        part = part.to(samples) - mean
        norms = part.square().sum(1)[:, None] + samples.square().sum(1)
        yield torch.addmm(norms, part, samples.T, alpha=-2).clamp_(min=0)
