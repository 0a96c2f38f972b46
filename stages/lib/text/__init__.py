"""Rows become token ids and masks: tokenizers, chat templates, packed blocks, chats, prompts, windows. No model here."""
