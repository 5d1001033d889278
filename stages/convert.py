"""Conversion: the teacher's own class with mixers where attention stood, seeded from the attention weights.

    python -m stages.convert recipes/quickstart.yaml

Writes run_dir/convert: a Hugging Face folder that already generates, with conversion.json saying what came from where.
"""

from distill.convert_stage import convert_stage
from stages.command import run_program

if __name__ == "__main__":
    run_program(convert_stage, "Convert a recipe's teacher into a student, and hand it to the first stage.")
