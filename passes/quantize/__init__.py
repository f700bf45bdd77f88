"""Quantisation: which layers, their scales, corrected biases, and the choice of a precision for each region."""

from .quantize import Quantize

__all__ = ["Quantize"]
