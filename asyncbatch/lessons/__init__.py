"""What the notebooks share (`teach.py`), and a module for the exercises and pictures of each of them."""
