"""Repair: the best weights after a removal, in closed form from a few unlabelled images."""

from .recalibrate import Recalibrate
from .repair import Repair

__all__ = ["Recalibrate", "Repair"]
