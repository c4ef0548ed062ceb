"""Processes and places: everything with a main."""

import os

from launch.tie import leave_with

if "TORCHELASTIC_RUN_ID" in os.environ:  # here, for torchrun may die in the seconds of imports
    leave_with(os.getppid())
