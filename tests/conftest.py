"""What several tests need: the reference values, and models with the reference's weights."""
