"""The metrics against independent computations."""

import math

import numpy as np
import torch

from unittests import Group

__unittest = True


class Metrics(Group):
    """The functions of metrics.py, compared with the same values computed in another way."""

    needs = ("evaluation.metrics",)

    def codes(self, count=40, z_dim=3):
        """Return codes with correlated dimensions that are far from N(0, I)."""
        return torch.randn(count, z_dim) @ torch.randn(z_dim, z_dim) + torch.randn(z_dim)

    def test_ks_distance_is_the_largest_step_between_two_distribution_functions(self):
        codes = self.codes()[:, :1]
        values = [float(value) for value in codes[:, 0]]
        largest = max(abs(sum(other <= point for other in values) / len(values) - math.erfc(-value / math.sqrt(2)) / 2)
                      for value in values for point in (value, value - 1e-9))
        self.check_close(self.metrics.ks_distance(codes, projections=5), largest, "the KS distance is wrong")

    def test_ks_distance_is_the_mean_over_projections(self):
        codes = self.codes(30, 4)
        directions = torch.randn(4, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        each = [self.metrics.ks_distance(codes.double() @ (direction / direction.norm())[:, None])
                for direction in directions.T]
        self.check_close(self.metrics.ks_distance(codes, 7, seed=5), sum(each) / 7,
                         "the mean over the projections is wrong")
        self.check_close(self.metrics.ks_distance(torch.randn(10_000, 8)), 0.8687 / 100,
                         "the KS distance of 10,000 prior samples is not the mean of Kolmogorov's distribution", 1e-3)

    def test_two_sample_accuracy(self):
        same, shifted, scaled = torch.randn(3, 3000, 8, generator=torch.Generator().manual_seed(1))
        shifted[:, 2] += 1.5
        scaled *= 0.5
        accuracies = []
        for codes in (same, shifted, shifted, scaled):
            stream = torch.manual_seed(len(accuracies)).get_state()
            with torch.no_grad():
                accuracies.append(self.metrics.two_sample_accuracy(codes))
            self.assertTrue(torch.equal(stream, torch.get_rng_state()), "torch's random state has changed")
        self.assertEqual(accuracies[1], accuracies[2], "equal seeds give different accuracies")
        best = math.erf(1.5 / 2 / math.sqrt(2)) / 2 + 0.5  # of a threshold half-way between the two means
        edge = 8 * math.log(4) / 3  # of the squared norm, where both densities are equal; chi-squared with 8 dimensions
        upper = [math.exp(-x / 2) * sum((x / 2)**k / math.factorial(k) for k in range(4)) for x in (edge, 4 * edge)]
        for accuracy, expected, name in ((accuracies[0], 0.5, "equal"), (accuracies[1], best, "shifted"),
                                         (accuracies[3], (1 + upper[0] - upper[1]) / 2, "scaled")):
            self.assertTrue(-0.03 < accuracy - expected < 0.02, (name, accuracy, expected))  # standard error: 0.0065
        points = torch.randn(6, 4).repeat(200, 1)  # the prior's moments, but in six points
        self.assertGreater(self.metrics.two_sample_accuracy(points), 0.8)

    def test_frechet_to_prior(self):
        codes = self.codes().double().numpy()
        mean, covariance = codes.mean(0), np.cov(codes.T)
        expected = mean @ mean + np.trace(covariance) + 3 - 2 * np.sqrt(np.linalg.eigvals(covariance)).sum()
        self.check_close(self.metrics.frechet_to_prior(torch.from_numpy(codes)), expected,
                         "the Frechet distance to the prior is wrong")
        shifted = torch.tensor([[-2.0], [2.0], [-2.0], [2.0]]) * math.sqrt(3) / 2 + 5  # mean 5, standard deviation 2
        self.check_close(self.metrics.frechet_to_prior(shifted), 5**2 + (2 - 1)**2, "N(5, 4) is not at 25 + 1")

    def test_frechet_distance_of_two_sets(self):
        first, second = self.codes(50, 5).double().numpy(), self.codes(60, 5).double().numpy()
        product = np.linalg.eigvals(np.cov(first.T) @ np.cov(second.T))  # of a matrix that is not symmetric
        difference = first.mean(0) - second.mean(0)
        total = np.trace(np.cov(first.T) + np.cov(second.T))
        expected = difference @ difference + total - 2 * np.sqrt(product.real).sum()
        self.check_close(self.metrics.frechet(torch.from_numpy(first), torch.from_numpy(second)), expected,
                         "the Frechet distance is wrong")

        features = torch.randn(20, 64) @ torch.randn(64, 64)  # fewer than dimensions: a singular covariance
        self.check_close(self.metrics.frechet(features, features), 0, "the distance of a set to itself is not 0", 1e-4)

    def test_parzen_log_likelihood(self):
        samples, images, sigma = torch.rand(30, 1, 28, 28), torch.rand(7, 1, 28, 28), 0.3
        window = torch.distributions.Normal(samples.double(), sigma)
        values = self.metrics.parzen_log_likelihood(samples, images, sigma)
        for value, image in zip(values, images.double(), strict=True):
            density = window.log_prob(image).flatten(1).sum(1).logsumexp(0) - math.log(30)
            self.check_close(value, density, "the Parzen log-likelihood is wrong", 1e-6)

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
        images = samples + 1e-3
        distances = torch.cat([*self.metrics.squared_distances(samples, images)])
        self.check_close(distances.mean() / 784e-6, 1, "squared distances of similar images are lost in rounding", 1e-3)
