"""Fine-tuning a finished student on chats or text, whole or through adapters; TRL trains (extra ``finetune``)."""
