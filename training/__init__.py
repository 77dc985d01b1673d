"""What training needs beyond the recipe in train.py."""
