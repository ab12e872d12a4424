"""A model to be used: from any stored form to a Flax module on the devices."""
