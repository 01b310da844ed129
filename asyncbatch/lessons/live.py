"""For all notebooks: pictures with sliders, drawn again while a slider moves."""

from __future__ import annotations

import io
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from ..pictures.picture import Picture
from .parts import slider, with_widget


class Sliders(Picture):
    """A picture below sliders, each with a box to type into. A subclass draws in `_update`.

    controls: for each slider (the attribute that it sets, label, lowest value, highest value, step;
        None: logarithmic)."""

    controls: tuple[tuple[str, str, float, float, float | None], ...]

    def _update(self) -> None:
        raise NotImplementedError

    def _live_png(self) -> bytes:
        """As `png`, but made fast, since it follows a slider; the file is larger."""
        canvas, file = FigureCanvasAgg(self.figure), io.BytesIO()
        canvas.draw()
        Image.fromarray(np.asarray(canvas.buffer_rgba())).save(file, "png", compress_level=1)
        return file.getvalue()

    @cached_property
    def widget(self) -> Any:
        """The sliders and the picture below them (an ipywidgets box)."""
        import ipywidgets

        # As large as it was drawn: stretched to the page's width, it would not fit a small screen with its sliders.
        wide = f"{round(self.figure.get_figwidth() * self.figure.dpi)}px"
        layout = ipywidgets.Layout(width=wide, max_width="100%", height="auto", align_self="flex-start")
        image = ipywidgets.Image(value=self._live_png(), format="png", layout=layout)

        def control(name: str, label: str, lowest: float, highest: float, step: float | None) -> Any:
            def moved(value: float) -> None:
                setattr(self, name, value)
                self._update()
                image.value = self._live_png()

            return slider(label, getattr(self, name), lowest, highest, moved, step)

        return ipywidgets.VBox([*(control(*one) for one in self.controls), image])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return with_widget(self, super()._repr_mimebundle_())
