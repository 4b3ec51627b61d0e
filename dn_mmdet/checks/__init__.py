"""Checks of configs, data and folders, before a tool writes anything."""

from ..environment import check_mmdet

check_mmdet()
