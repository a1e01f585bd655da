"""The only importers of private torch, by subject: everything that a release may move.

Supported: torch 2.11 and newer. A missing symbol is reported once, by name, as
`UnsupportedTorchError`, when the package is imported: a compilation is no place to learn of it.
"""
