"""The exercises of all notebooks, by name. The solution of each is a function of this package."""

from . import batching, beyond, cache, idle, loop, measuring, pays, slots, streams

EXERCISES = {
    **idle.EXERCISES,
    **batching.EXERCISES,
    **streams.EXERCISES,
    **cache.EXERCISES,
    **slots.EXERCISES,
    **loop.EXERCISES,
    **measuring.EXERCISES,
    **pays.EXERCISES,
    **beyond.EXERCISES,
}
