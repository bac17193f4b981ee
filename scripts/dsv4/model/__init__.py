"""DeepSeek-V4: tensors, names, labels, configuration, conversation, and the plan of a bundle.

Reads headers and JSON, never a weight.
May import: storage and lower layers.
"""
