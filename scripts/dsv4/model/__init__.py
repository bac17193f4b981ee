"""What DeepSeek-V4 is made of: its names, labels, configuration and conversation, and the plan
of a bundle.
Reads headers and JSON, never a weight.
May import: storage and what lies below it.
"""
