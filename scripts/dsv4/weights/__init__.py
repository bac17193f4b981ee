"""Numbers: the source's formats decoded, the quantizers and what they are made of.
May import: model, hub, runtime and what lies below them.
"""
