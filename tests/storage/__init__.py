"""Tests of the store, and the devices that they run it on."""
