"""Exercises and pictures that belong to one notebook, a module for each; `teach.py` has what all notebooks share."""
