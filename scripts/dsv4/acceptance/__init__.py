"""Questions to a running server: cases, their judgement, and speed.

May import: quantization and lower layers.
"""
