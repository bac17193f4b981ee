"""Number formats: FP4 and FP8 decoded, the quantizers, and the importance matrix.

May import: model, hub, toolchain and lower layers.
"""
