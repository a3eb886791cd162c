"""Measurements of the library beside its peers; never imported by the library."""
