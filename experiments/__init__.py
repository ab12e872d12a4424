"""The project's main experiment: does one unified model match a specialist in each field?"""
