"""The metrics against independent computations."""

import math

import numpy as np
import torch

from unittests import Group

__unittest = True


class Metrics(Group):
    """The functions of metrics.py, compared with the same values computed in another way."""

    needs = ("evaluation.metrics", "evaluation.monitoring")

    def codes(self, count, z_dim):
        """Return codes with correlated dimensions that are far from N(0, I)."""
        return torch.randn(count, z_dim) @ torch.randn(z_dim, z_dim) + torch.randn(z_dim)

    def test_ks_distance_is_the_mean_over_projections_of_the_largest_step(self):
        def ks_distance(values):
            return max(abs(sum(other <= point for other in values) / len(values) - math.erfc(-point / math.sqrt(2)) / 2)
                       for value in values for point in (value, value - 1e-9))

        codes = self.codes(30, 4)
        directions = torch.randn(4, 27, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        projections = codes.double() @ (directions / directions.norm(dim=0))
        expected = sum(ks_distance(values) for values in projections.T.tolist()) / 27
        self.check_close(self.monitoring.ks_distance(codes, 27, seed=5), expected, "the KS distance is wrong")
        self.check_close(self.monitoring.ks_distance(torch.randn(10_000, 8)), 0.8687 / 100,
                         "the KS distance of 10,000 prior samples is not the mean of Kolmogorov's distribution", 1e-3)

    def test_two_sample_accuracy(self):
        same, shifted, scaled = torch.randn(3, 3000, 8, generator=torch.Generator().manual_seed(1))
        shifted[:, 2] += 1.5
        scaled *= 0.5
        best = math.erf(1.5 / 2 / math.sqrt(2)) / 2 + 0.5  # of a threshold half-way between the two means
        edge = 8 * math.log(4) / 3  # of the squared norm, where both densities are equal; chi-squared with 8 dimensions
        upper = [math.exp(-x / 2) * sum((x / 2)**k / math.factorial(k) for k in range(4)) for x in (edge, 4 * edge)]
        for name, codes, expected in (("equal", same, 0.5), ("shifted", shifted, best),
                                      ("scaled", scaled, (1 + upper[0] - upper[1]) / 2)):
            accuracy = self.metrics.two_sample_accuracy(codes)
            self.assertTrue(-0.03 < accuracy - expected < 0.02, (name, accuracy, expected))  # standard error: 0.0065
        points = torch.randn(6, 4).repeat(200, 1)  # the prior's moments, but in six points
        accuracy = self.metrics.two_sample_accuracy(points)
        self.assertGreater(accuracy, 0.8)
        torch.manual_seed(5)
        self.assertEqual(self.metrics.two_sample_accuracy(points), accuracy, "it depends on torch's random state")

    def test_frechet_distances(self):
        def expected(mean, covariance, other_mean, other_covariance):
            overlap = np.sqrt(np.linalg.eigvals(covariance @ other_covariance).real).sum()
            return ((mean - other_mean)**2).sum() + np.trace(covariance + other_covariance) - 2 * overlap

        first, second = self.codes(50, 5).double(), self.codes(60, 5).double()
        moments, other_moments = ((codes.mean(0).numpy(), np.cov(codes.T)) for codes in (first, second))
        self.check_close(self.metrics.frechet(first, second), expected(*moments, *other_moments),
                         "the Frechet distance is wrong")
        self.check_close(self.metrics.frechet_to_prior(first), expected(*moments, np.zeros(5), np.eye(5)),
                         "the Frechet distance to the prior is wrong")
        features = torch.randn(20, 64) @ torch.randn(64, 64)  # fewer than dimensions: a singular covariance
        self.check_close(self.metrics.frechet(features, features), 0, "the distance of a set to itself is not 0", 1e-4)

    def test_parzen_log_likelihood(self):
        samples, images, sigma = torch.rand(30, 1, 28, 28), torch.rand(7, 1, 28, 28), 0.3
        density = torch.distributions.Normal(samples.double(), sigma).log_prob(images[:, None].double())
        torch.testing.assert_close(self.metrics.parzen_log_likelihood(samples, images, sigma),
                                   density.flatten(2).sum(2).logsumexp(1) - math.log(30), rtol=1e-6, atol=0)

    def test_sigma_is_the_best_one(self):
        samples = torch.rand(1, 784).expand(20, 784)
        images = samples[:1] + 0.37 * torch.randn(600, 784)
        best = (images - samples[:1]).square().mean().sqrt()  # the maximum likelihood estimate for a known mean
        self.check_close(self.metrics.choose_sigma(samples, images), best,
                         "sigma is not the maximum likelihood estimate", 0.005)
        for edges in ({"low": 0.5}, {"high": 0.1}):
            with self.assertRaises(ValueError):
                self.metrics.choose_sigma(samples, samples[:1] + 0.2 * torch.randn(30, 784), **edges)

    def test_distances_of_similar_images_do_not_suffer_from_cancellation(self):
        samples = torch.ones(3, 784)
        distances = torch.cat([*self.metrics.squared_distances(samples, samples + 1e-3)])
        self.check_close(distances.mean() / 784e-6, 1, "squared distances of similar images are lost in rounding", 1e-3)
