"""The Hugging Face hub: listings, resumable downloads, uploads, and the record of each.

May import: storage and lower layers.
"""
