"""How good a model is:  python -m evaluation RUN"""
