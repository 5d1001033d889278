"""Tuning a finished student on chats, text, preferences or what it writes, whole or through adapters.

TRL trains (extra ``finetune``).
"""
