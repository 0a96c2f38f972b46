"""Stages that train a language model on text and on chats."""
