"""Make a bundle: convert, requantize, finalize, patch, and plan its size.

May import: quantization and lower layers, not verification or acceptance.
"""
