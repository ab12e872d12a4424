"""The joint step, its optimizer, and the loop that keeps it going."""
