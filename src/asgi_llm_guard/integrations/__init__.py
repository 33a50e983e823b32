"""Hooks for the libraries that people already use. Each is imported by its own name, and needs its library."""
