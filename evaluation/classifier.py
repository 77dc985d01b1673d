"""The digit classifier whose features the evaluation uses to compare images; benchmarks/classifier.py trained it."""

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
from torchvision.ops import Conv2dNormActivation as Convolution  # 3x3, with batch normalisation and ReLU

from training.files import load_checked

CLASSIFIER = Path(__file__).resolve().parent.parent / "assets" / "digit_classifier.pt"
BATCH = 250  # images per forward pass outside training


def digit_classifier():
    """Return a new classifier, from images [B, 1, 28, 28] in [-1, 1] to `features` [B, 64] and to logits [B, 10]."""
    features = nn.Sequential(
        *Convolution(1, 32), nn.MaxPool2d(2),   # 28x28 -> 14x14
        *Convolution(32, 48), nn.MaxPool2d(2),  # 14x14 -> 7x7
        *Convolution(48, 96),
        *Convolution(96, 96, padding=0),        # 7x7 -> 5x5
        nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(96 * 5 * 5, 64), nn.ReLU())
    return nn.Sequential(OrderedDict(features=features, last=nn.Linear(64, 10)))


def load_classifier(device="cpu"):
    """Return the trained classifier in evaluation mode; raise UserError if its file is damaged."""
    classifier = digit_classifier()
    classifier.load_state_dict(load_checked(CLASSIFIER, f"restore it: git checkout -- assets/{CLASSIFIER.name}"))
    return classifier.to(device).eval()


@torch.no_grad()
def features_and_probabilities(classifier, images):
    """Return features [N, 64], at least 0, and digits' probabilities [N, 10] of images; in evaluation mode."""
    device = classifier.last.weight.device
    features = torch.cat([classifier.features(batch.to(device)) for batch in images.split(BATCH)])
    return features, classifier.last(features).softmax(1)
