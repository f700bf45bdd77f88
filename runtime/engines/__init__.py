"""Inference libraries (backends) behind one interface, `base.Engine`; the table of them is in `backends`."""
