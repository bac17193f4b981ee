"""The Hugging Face hub: what it lists, its files fetched and resumed, where a source came from.
May import: storage and what lies below it.
"""
