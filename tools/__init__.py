"""What `make` runs, and what maintainers run by hand. Each file says in its first lines how."""
