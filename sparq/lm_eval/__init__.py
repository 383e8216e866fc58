"""Evaluations of language models with EleutherAI's lm-eval: SparQ and the methods it is compared with."""
