"""Modules of ours."""
