"""On-policy distillation: the student writes, the teacher grades every token of it.

    python -m stages.onpolicy recipes/finetune/onpolicy.yaml model=runs/quickstart/logits data.source=prompts.jsonl

min D_β(teacher ‖ student), a mean over the tokens that the student wrote (Agarwal et al. 2024, arXiv 2306.13649): a
student is corrected where its own errors lead it, which text by others never shows. TRL trains; the result is a Hugging
Face folder, of the model or of an adapter that plain PEFT loads. Whenever it is killed, the same command goes on.
"""

from functools import partial

from distill.finetuning.job import at_work_on_tuning
from distill.finetuning.on_policy import load_on_policy_recipe
from distill.finetuning.programs import tune_and_tell
from stages.command import run_program

if __name__ == "__main__":
    at_work = partial(at_work_on_tuning, load=load_on_policy_recipe)
    run_program(tune_and_tell, "Distil a student on what it writes itself.", at_work)
