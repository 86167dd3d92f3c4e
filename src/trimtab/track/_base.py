"""What every tracker is."""

from typing import ClassVar

from trimtab.core.config import Choice


class Tracker(Choice):
    """A service or file format that shows the curves of runs."""

    family: ClassVar[str] = "trimtab.track"
    default: ClassVar[str] = "tensorboard"
