"""Wire protocols as sans-I/O machines, one folder each, found through the registry."""
