"""Preference tuning: of two answers to a prompt, the student learns to give the chosen one rather than the rejected.

    python -m stages.prefer recipes/finetune/prefer.yaml model=runs/quickstart/finetune data.source=pairs.jsonl

min − log σ(β (Δ(chosen) − Δ(rejected))) with Δ = log(student / reference) of a whole answer: direct preference
optimisation (Rafailov et al. 2023, arXiv 2305.18290), a mean over pairs. The recipe says what the reference is. TRL
trains; the result is a Hugging Face folder, of the model or of an adapter that plain PEFT loads. Whenever it is killed,
the same command goes on.
"""

from functools import partial

from distill.finetuning.job import at_work_on_tuning
from distill.finetuning.preferences import load_prefer_recipe
from distill.finetuning.programs import tune_and_tell
from stages.command import run_program

if __name__ == "__main__":
    at_work = partial(at_work_on_tuning, load=load_prefer_recipe)
    run_program(tune_and_tell, "Teach a student which of two answers is preferred.", at_work)
