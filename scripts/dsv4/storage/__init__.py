"""Bytes on a disk: safetensors files, folders of them, durable writing, locks.
Knows neither names nor numbers of the model.
May import: stop, settings.
"""
