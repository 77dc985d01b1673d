"""What a training step and an epoch need beyond the recipe in train.py."""
