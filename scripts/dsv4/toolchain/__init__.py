"""Other people's programs: the runtimes' Python environments, servers, patches, and the converter.

They run in processes of their own, and nothing of them is imported here.
May import: storage and lower layers.
"""
