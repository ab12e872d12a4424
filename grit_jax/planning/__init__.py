"""Compiles a training step for TPUs without having any, and reports its memory and speed."""
