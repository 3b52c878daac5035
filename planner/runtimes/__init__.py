"""What executes an artifact: its kernels and their limits, its servers and how they are told a plan's settings.

Pure: tables in, argument lists and texts out. Nothing here starts a program.
"""
