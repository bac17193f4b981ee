"""A model run one layer at a time, so that 160 GB need the memory of one layer: how far a bundle is
from its source, and an importance matrix.

engine.py and what it imports run in the toolchain's Python; the rest runs beside the commands.
May import: making, proof, served and what lies below them; not mending.
"""
