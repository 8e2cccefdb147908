"""Tests, in the folders of the layers that they test."""
