"""The engines of convert, requantize, finalize and patch: from a source to a finished bundle.
May import: weights and what lies below it; not proof, not served.
"""
