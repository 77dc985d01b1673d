"""The evaluation of trained models:  python -m evaluation RUN"""
