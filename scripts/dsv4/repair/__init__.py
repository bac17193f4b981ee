"""Repair a bundle, and undo it: fix what verify finds, using the conversion code.

May import: every other package.
"""
