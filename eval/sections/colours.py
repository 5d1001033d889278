"""The colours of models in a section's charts, in the order they were given: usually a teacher, then students."""

COLOURS = ("teacher", "logits", "convert", "hidden", "mixing", "other")
