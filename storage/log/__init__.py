"""The intent log: what was acknowledged since the last consistency point, as records in a ring."""
