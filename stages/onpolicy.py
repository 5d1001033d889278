"""On-policy distillation: the student writes, the teacher grades every token of it.

    python -m stages.onpolicy recipes/finetune/onpolicy.yaml model=runs/quickstart/logits data.source=prompts.jsonl

min D_β(teacher ‖ student), a mean over the tokens that the student wrote (Agarwal et al. 2024, arXiv 2306.13649): a
student is corrected where its own errors lead it, which text by others never shows. TRL trains; the result is a Hugging
Face folder, of the model or of an adapter that plain PEFT loads. Whenever it is killed, the same command goes on.
"""

from distill.finetuning.on_policy import load_on_policy_recipe
from stages.tuning_command import tuning_program

if __name__ == "__main__":
    tuning_program(load_on_policy_recipe, "Distil a student on what it writes itself.")
