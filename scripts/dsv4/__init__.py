"""Shared packages, from the lowest layer to the highest; a module imports from lower layers only.

text, errors, settings, storage, then model, hub, toolchain, then quantization, then conversion,
verification, acceptance, then repair and evaluation, then the commands in scripts/ and
scripts/lab/. Packages of one layer do not import each other. `make lint` checks it (.importlinter).
"""
