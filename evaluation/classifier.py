"""The digit classifier whose features the evaluation uses to compare images; benchmarks/classifier.py trained it."""

from pathlib import Path

import torch
import torch.nn as nn

from training.checkpoint import CheckpointError, load_checked
from training.cli import UserError

CLASSIFIER = Path(__file__).resolve().parent.parent / "assets" / "digit_classifier.pt"
BATCH = 250  # images per forward pass outside training


class DigitClassifier(nn.Module):
    """Maps images [B, 1, 28, 28] in [-1, 1] to digit logits [B, 10]; `features` returns the last layer's input."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *convolution(1, 32), nn.MaxPool2d(2),   # 28x28 -> 14x14
            *convolution(32, 48), nn.MaxPool2d(2),  # 14x14 -> 7x7
            *convolution(48, 96),
            *convolution(96, 96, padding=0),        # 7x7 -> 5x5
            nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(96 * 5 * 5, 64), nn.ReLU())
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        return self.last(self.features(x))


def convolution(channels_in, channels_out, padding=1):
    """Return the layers of a 3x3 convolution with batch normalisation and ReLU."""
    layer = nn.Conv2d(channels_in, channels_out, 3, padding=padding, bias=False)
    return layer, nn.BatchNorm2d(channels_out), nn.ReLU()


def load_classifier(device="cpu"):
    """Return the trained classifier in evaluation mode; raise UserError if its file is missing or damaged."""
    classifier = DigitClassifier()
    try:
        classifier.load_state_dict(load_checked(CLASSIFIER))
    except (CheckpointError, RuntimeError, TypeError):
        fault = "is damaged, or from another version" if CLASSIFIER.is_file() else "is missing"
        raise UserError(f"{CLASSIFIER} {fault}; restore it, for example with: "
                        f"git checkout -- assets/{CLASSIFIER.name}") from None
    return classifier.to(device).eval()


@torch.no_grad()
def features_and_probabilities(classifier, images):
    """Return features [N, 64], at least 0, and digits' probabilities [N, 10] of images; in evaluation mode."""
    device = classifier.last.weight.device
    features = torch.cat([classifier.features(batch.to(device)) for batch in images.split(BATCH)])
    return features, classifier.last(features).softmax(1)
