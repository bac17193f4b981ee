"""Run a model one layer at a time: KL divergence to the source, and the importance matrix.

worker.py and what it imports run in the toolchain's Python; the rest runs in the scripts' own.
May import: conversion, verification, acceptance and lower layers.
"""
