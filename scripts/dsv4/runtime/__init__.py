"""Other people's programs: the toolchain's Python, its loaders and their patches, its server,
upstream's converter.
Always asked from outside, in a process of their own.
May import: storage and what lies below it.
"""
