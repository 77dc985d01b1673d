"""The metrics against independent computations."""

import math

import numpy as np
import torch

from unittests import Group

__unittest = True


class Metrics(Group):
    """The functions of metrics.py and ks_distance, compared with the same values computed in another way."""

    needs = ("evaluation.metrics", "evaluation.monitoring")

    def test_ks_distance_is_the_mean_over_projections_of_the_largest_step(self):
        def ks_distance(values):
            return max(abs(sum(other <= point for other in values) / len(values) - math.erfc(-point / math.sqrt(2)) / 2)
                       for value in values for point in (value, value - 1e-9))

        codes = torch.randn(30, 4) @ torch.randn(4, 4) + torch.randn(4)  # correlated, and far from N(0, I)
        directions = torch.randn(4, 27, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        projections = codes.double() @ (directions / directions.norm(dim=0))
        expected = sum(ks_distance(values) for values in projections.T.tolist()) / 27
        self.check_close(self.monitoring.ks_distance(codes, 27, seed=5), expected, "the KS distance is wrong")
        self.check_close(self.monitoring.ks_distance(torch.randn(10_000, 8)), 0.8687 / 100,
                         "the KS distance of 10,000 prior samples is not the mean of Kolmogorov's distribution", 1e-3)

    def test_frechet_distances(self):
        def expected(mean, covariance, other_mean, other_covariance):
            overlap = np.sqrt(np.linalg.eigvals(covariance @ other_covariance).real).sum()
            return ((mean - other_mean)**2).sum() + np.trace(covariance + other_covariance) - 2 * overlap

        for z_dim in (5, 1):
            pair = [torch.randn(count, z_dim).double() @ torch.rand(z_dim, z_dim).double() + 1 for count in (50, 60)]
            moments = [(codes.mean(0).numpy(), np.atleast_2d(np.cov(codes.T))) for codes in pair]
            self.check_close(self.metrics.frechet(*pair), expected(*moments[0], *moments[1]), "the distance is wrong")
        features = torch.randn(20, 64) @ torch.randn(64, 64)  # fewer than dimensions: a singular covariance
        self.check_close(self.metrics.frechet(features, features), 0, "the distance of a set to itself is not 0", 1e-4)

    def test_parzen_log_likelihood_and_its_best_sigma(self):
        samples, images, sigma = torch.rand(30, 784), torch.rand(7, 784), 0.3
        density = torch.distributions.Normal(samples.double(), sigma).log_prob(images[:, None].double())
        distances = self.metrics.squared_distances(samples, images)
        torch.testing.assert_close(self.metrics.parzen_log_likelihood(distances, 784, sigma),
                                   density.sum(2).logsumexp(1) - math.log(30), rtol=1e-6, atol=0)
        samples, noise = torch.rand(1, 784).expand(20, 784), 0.37 * torch.randn(600, 784)
        sigma = self.metrics.choose_sigma(samples, samples[:1] + noise)
        self.check_close(sigma, noise.square().mean().sqrt(), "it is not the maximum likelihood estimate", 0.005)
        for edges in ({"low": 0.5}, {"high": 0.1}):
            self.assertRaises(ValueError, self.metrics.choose_sigma, samples, samples[:1] + noise, **edges)

    def test_distances_of_similar_images_do_not_suffer_from_cancellation(self):
        distances, = self.metrics.squared_distances(torch.ones(3, 784), torch.ones(3, 784) + 1e-3)
        self.check_close(distances.mean() / 784e-6, 1, "squared distances of similar images are lost in rounding", 1e-3)
