"""The exercises of all notebooks, by name. The solution of each is a function of this package."""

from . import cache, idle, measuring, streams

EXERCISES = {**idle.EXERCISES, **streams.EXERCISES, **cache.EXERCISES, **measuring.EXERCISES}
