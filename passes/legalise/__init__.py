"""Rewriting what an accelerator lacks by what it has."""

from .legalise import Legalise as Legalise
