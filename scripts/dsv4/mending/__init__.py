"""The engine of repair, and its undo: what proof finds is made right by making.
May import: every other room.
"""
