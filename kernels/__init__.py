"""Numeric ops behind one signature each: Triton on GPUs, C++ on CPUs, plain PyTorch on request.

Every op is row-independent with one fixed reduction order (the prefix law is won here): the bits of a row's result do
not depend on which rows stand beside it, on how many there are, or on which thread computes it.
"""
