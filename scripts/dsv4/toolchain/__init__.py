"""Run third-party programs: the runtimes' Python environments, servers, patches, the converter.

They run in child processes; nothing of them is imported here.
May import: storage and lower layers.
"""
