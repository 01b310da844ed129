"""Pictures: timelines as a PNG everywhere, and in a notebook to zoom, drag and hover over. Needs matplotlib.

from asyncbatch.pictures import plot
plot(sync.timeline, async_.timeline)
"""

from .picture import Picture, figure
from .timelines import TimelineFigure, plot

__all__ = ["Picture", "TimelineFigure", "figure", "plot"]
