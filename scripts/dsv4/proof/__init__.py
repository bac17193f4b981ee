"""What verify, inspect and publish say of a bundle, and why they may say it.
Judges with code of its own: nothing here imports what made the bundle.
May import: weights and what lies below it; not making, not served.
"""
