"""Safetensors files, checkpoints, bounded JSON, atomic writes, locks.

Knows nothing of the model.
May import: settings, errors, text.
"""
