"""The exercises of all notebooks, by name. The solution of each is a function of this package."""

from . import beyond, cache, idle, loop, measuring, slots, streams

EXERCISES = {
    **idle.EXERCISES,
    **streams.EXERCISES,
    **cache.EXERCISES,
    **slots.EXERCISES,
    **loop.EXERCISES,
    **measuring.EXERCISES,
    **beyond.EXERCISES,
}
