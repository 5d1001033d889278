"""lm-evaluation-harness on students and teachers: its programs, the model it knows them by, and tasks of our own."""
