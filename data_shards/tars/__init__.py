"""Tars as they lie on a disk: walked strictly, indexed where others wrote them, verified."""
