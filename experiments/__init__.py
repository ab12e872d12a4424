"""Experiment: does one unified model match an embedding and a generative specialist?"""
