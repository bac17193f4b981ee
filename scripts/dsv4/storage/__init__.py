"""Bytes on a disk: safetensors files, folders of them, bounded JSON, durable writing, locks.
Knows neither names nor numbers of the model.
May import: words, stop, settings.
"""
