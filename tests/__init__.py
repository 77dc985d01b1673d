"""Tests of everything beyond the interface of the assignment, a file for each topic:  python unittests.py"""
