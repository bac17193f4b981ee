"""The rooms of the house, from the ground up: an import goes down the stairs only.

words < stop < settings < storage < model, hub, runtime < weights < making, proof, served < mending
< the commands in scripts/ and scripts/lab/. Rooms of one floor do not know each other. `make lint`
holds every import to it; each room says in its __init__.py what it is for.
"""
