"""Builds the embedded sample from Debian packages."""
