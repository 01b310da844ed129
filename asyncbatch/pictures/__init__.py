"""Pictures, made with matplotlib. A timeline is a PNG everywhere; in a notebook it can be zoomed and dragged.

from asyncbatch.pictures import plot

plot(sync.timeline, async_.timeline)
"""

from .picture import Picture, figure
from .timelines import TimelineFigure, plot

__all__ = ["Picture", "TimelineFigure", "figure", "plot"]
