"""Stages that train an encoder on a task: classes of texts, spans in texts, answers in contexts."""
