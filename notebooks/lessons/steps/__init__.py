"""Steps to quality of language models: optimizers, teachers, growth, experts."""
