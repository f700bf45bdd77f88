"""Predicted latency of programs that were not measured.

layers: layers as JSON-able rows. roofline: seconds of a layer from a data sheet, or fitted to bench bundles, which
`measured` reads. latency_table: seconds of a layer, measured with `micro_models`. layer_report: `predict`, the report on
all layers of programs.
"""
