"""Supervised fine-tuning of a student on chats or text, whole or through adapters.

    python -m stages.finetune recipes/finetune/chat.yaml model=runs/quickstart/logits

min − Σ log p(token | what came before), a mean over the tokens that are scored: the assistant's, or all. With a
teacher of weight w on top, (1 − w) of it and w τ² D(teacher ‖ student at temperature τ) over the same tokens, so that
the student does not forget what the data does not say. TRL trains; the result is a Hugging Face folder, of the model
or of an adapter that plain PEFT loads. Whenever it is killed, the same command goes on.
"""

from functools import partial

from distill.finetuning.job import at_work_on_tuning
from distill.finetuning.programs import tune_and_tell
from distill.finetuning.recipe import load_finetune_recipe
from stages.command import run_program

if __name__ == "__main__":
    at_work = partial(at_work_on_tuning, load=load_finetune_recipe)
    run_program(tune_and_tell, "Fine-tune a student on chats or text.", at_work)
